"""Writes the tables of `docs/models` from the results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).resolve().parents[2] / "docs" / "models"
RESULTS = Path(__file__).parent / "results.json"
_TABLE = re.compile(r"(<!-- table: python -m benchmarks\.models -->\n)(.*?)(<!-- end of the table -->)", re.DOTALL)
_WORDS = r"(?<=/)|(?<=\w)(?=For|Vision|Transformer|Model\b|Generation)"
_ROWS = {
    "plain": "a row per image or tile",
    "anyres": "a row per tile",
    "padded": "a row per image that is not padding",
    "grid": "all images in one sequence, split by `image_grid_thw`",
    "sizes": "all images in one sequence, split by `image_sizes`",
    "rows": "a row per image, with all of its tiles",
}


def read() -> list[dict[str, Any]]:
    """Return the results, one of each entry of `CHECKPOINTS`."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def written(page: Path, rows: list[dict[str, Any]]) -> str:
    """Return a page with the table that belongs on it.

    Args:
        page: A page of `docs/models`.
        rows: All results.

    Raises:
        ValueError: If it has no place for a table, or more than one.
    """
    table = index(rows) if page.stem == "index" else facts([row for row in rows if row["page"] == page.stem])
    text, places = _TABLE.subn(lambda match: f"{match[1]}\n{table}\n\n{match[3]}", page.read_text(encoding="utf-8"))
    if places != 1:
        raise ValueError(f"{page.name} has {places} places for a table")
    return text


def facts(rows: list[dict[str, Any]]) -> str:
    """Return the table of one page: a column per checkpoint.

    Args:
        rows: The results of the page.
    """
    lines = {
        "class": [_breakable(row["model"]) for row in rows],
        "tower": [_breakable(row["tower"]) for row in rows],
        "its size": [_size(row) for row in rows],
        "its batch": [_ROWS[row["layout"]] for row in rows],
        "what is read": [_read(row) for row in rows],
        "`layers=None`": [_chosen(row) for row in rows],
        "parameters added": [f"{row['added']:,}" for row in rows],
        "trained in the tower": [f"{row['trained']:,}" for row in rows],
    }
    heads = ["<br>".join(_breakable(name) for name in row["names"]) for row in rows]
    table = [f"| | {' | '.join(heads)} |", "|---" * (len(rows) + 1) + "|"]
    return "\n".join(table + [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()])


def index(rows: list[dict[str, Any]]) -> str:
    """Return the table of the first page: a line per checkpoint.

    Args:
        rows: All results.
    """
    lines = ["| such as | blocks | width | parameters | `layers=None` | added |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        name = row["names"][0].partition("/")[2]
        chosen = _chosen(row).removeprefix("blocks ").replace(" to ", "&ndash;")
        cells = (row["blocks"], row["width"], f"{row['parameters']:,}", chosen, f"{row['added']:,}")
        lines.append(f"| [{name}]({row['page']}.md) | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _breakable(name: str) -> str:
    """Let a long name break after a slash and before its words, as a narrow column needs it."""
    return f"<code>{re.sub(_WORDS, '<wbr>', name)}</code>"


def _size(row: dict[str, Any]) -> str:
    millions = round(row["parameters"] / 1e6)
    return f"{row['blocks']} blocks of width {row['width']}, {millions:,} million parameters"


def _chosen(row: dict[str, Any]) -> str:
    first, last = row["layers"][0], row["layers"][-1]
    assert row["layers"] == list(range(first, last + 1))
    return f"blocks {first} to {last}"


def _read(row: dict[str, Any]) -> str:
    last = row["blocks"] + row["read"]
    told = f"the output of block {last}" + ("" if row["read"] == -1 else f" (`hidden_states[{row['read']}]`)")
    if row["also"]:
        told += f", and those of blocks {', '.join(map(str, row['also']))}"
    return told
