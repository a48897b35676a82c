"""The blocks of the guides that an engine runs."""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

from tests.real.environments import ROOT

_NAMED = re.compile(
    r"^(?P<indent> *)<!-- run: (?P<name>[\w-]+) -->\n+"
    r"(?P=indent)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$",
    flags=re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block with a name."""

    language: str
    text: str


def named_blocks(page: str) -> dict[str, Block]:
    """Return the named blocks of a page of docs/, such as "guides/ms-swift.md"."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = list(_NAMED.finditer(text))
    blocks = {m["name"]: Block(m["info"].split(" ")[0], textwrap.dedent(m["body"])) for m in found}
    if len(blocks) != len(found):
        raise ValueError(f"docs/{page}: two blocks have the same name")
    return blocks


def block(page: str, name: str) -> Block:
    """Return one named block of a page."""
    blocks = named_blocks(page)
    if name not in blocks:
        raise LookupError(f"docs/{page} has no block named {name!r} (<!-- run: {name} -->), only {sorted(blocks)}")
    return blocks[name]


def replaced(text: str, replace: dict[str, str]) -> str:
    """Replace each key by its value; a key that the text does not contain is an error."""
    absent = [key for key in replace if key not in text]
    if absent:
        raise LookupError(f"the block of the guide does not contain {absent}")
    for key, value in replace.items():
        text = text.replace(key, value)
    return text
