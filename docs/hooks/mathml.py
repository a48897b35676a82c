"""Turns the formulas of a page into MathML, which browsers draw without scripts or network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?P<open>\\\(|\\\[)(?P<tex>.*?)(?:\\\)|\\\])</(?P=tag)>',
    re.DOTALL,
)


def on_page_content(page_html: str, **_: Any) -> str:
    """Replace the formulas in the HTML of a page; called by mkdocs."""
    return _FORMULA.sub(_to_mathml, page_html)


def _to_mathml(match: re.Match[str]) -> str:
    display = "inline" if match["open"] == r"\(" else "block"
    return convert(html.unescape(match["tex"]).strip(), display=display)
