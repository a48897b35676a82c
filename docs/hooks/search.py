"""Ranks pages in the search: guides and models before the API, and the changelog last."""

from __future__ import annotations

from typing import Any

# The errors stay: someone who searches for the name of one wants its docstring.
_BOOSTS = {"api/errors.md": 1.0, "api/": 0.4, "changelog.md": 0.1}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> None:
    """Set the boost of a page that has none of its own; called by mkdocs."""
    for start, boost in _BOOSTS.items():
        if page.file.src_uri.startswith(start):
            page.meta.setdefault("search", {"boost": boost})
            return
