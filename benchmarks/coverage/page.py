"""Writes the packaged table and the documentation page from the results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

from covft.adapters.coverage import FILE, LIBRARIES, Coverage, load_coverage

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "coverage.md"
DISTRIBUTIONS = {"open_clip": "open_clip_torch", "timm": "timm", "transformers": "transformers"}
_VERDICTS = ("wrapped", "refused", "failed")


def results_file(library: str) -> Path:
    """Return the file of the results for a library, one JSON object per line."""
    return RESULTS / f"{library}.jsonl"


def read(library: str) -> list[dict[str, Any]]:
    """Read the results for a library, the last of each model."""
    file = results_file(library)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return list({line["name"]: line for line in map(json.loads, lines)}.values())


def group(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group models of one class with the same result into rows, without models that have no attention.

    Args:
        results: What `check` found, as JSON has it.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in results:
        if result["verdict"] not in _VERDICTS:
            continue
        reason, layouts = one_line(result["reason"]), sorted(result["layouts"])
        key = (str(_VERDICTS.index(result["verdict"])), result["class_name"].lower(), ",".join(layouts), reason)
        row = rows.setdefault(
            key,
            {
                "class_name": result["class_name"],
                "verdict": result["verdict"],
                "reason": reason,
                "layouts": layouts,
                "blocks": [result["num_blocks"]] * 2,
                "models": [],
            },
        )
        row["models"].append(result["name"])
        row["blocks"] = [min(row["blocks"][0], result["num_blocks"]), max(row["blocks"][1], result["num_blocks"])]
    for row in rows.values():
        row["models"].sort()
    return [rows[key] for key in sorted(rows)]


def one_line(reason: str) -> str:
    """Return the problem that an error states, without its expected, got and fix lines."""
    text = re.split(r"\n\s+(?:Expected|Got|Fix|Known):", reason)[0]
    return re.sub(r"^\w+ (?:has no transformer blocks with an FFN|cannot be wrapped): ", "", " ".join(text.split()))[
        :300
    ]


def versions() -> dict[str, str]:
    """Return the version of each library when it was checked, or the installed one."""
    file = RESULTS / "versions.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {library: known.get(library) or metadata.version(DISTRIBUTIONS[library]) for library in LIBRARIES}


def write() -> None:
    """Write both from the results that exist."""
    table = {}
    for library in LIBRARIES:
        rows = group(read(library))
        if rows:
            table[library] = {"version": versions()[library], "rows": rows}
    FILE.write_text(dumps(table), encoding="utf-8")
    PAGE.write_text(page([load_coverage(library) for library in table]), encoding="utf-8")


def dumps(table: dict[str, dict[str, Any]]) -> str:
    """Format JSON with one line per row, so that one changed row changes one line."""
    libraries = []
    for library, entry in sorted(table.items()):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in entry["rows"])
        libraries.append(
            f' {json.dumps(library)}: {{"version": {json.dumps(entry["version"])}, "rows": [\n{rows}\n ]}}'
        )
    return "{\n" + ",\n".join(libraries) + "\n}\n"


def page(found: list[Coverage]) -> str:
    """Return the page of the documentation.

    Args:
        found: What was found for each library.
    """
    parts = [_INTRODUCTION]
    for coverage in found:
        parts.append(_section(coverage))
    return "\n".join(parts)


def _section(coverage: Coverage) -> str:
    counts = {verdict: coverage.count(verdict) for verdict in _VERDICTS}
    told = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    lines = [
        f"## {coverage.library} {coverage.version}",
        "",
        f"{coverage.count()} models with attention: {', '.join(told)}.",
        "",
        *_wrapped(coverage),
    ]
    others = [row for row in coverage.rows if row.verdict != "wrapped"]
    if others:
        lines += ["", "| not wrapped | models | such as | why |", "|---|---:|---|---|"]
    for row in others:
        reason = row.reason.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {row.class_name} | {len(row.models)} | {_example(row.models)} | {row.verdict}: {reason} |")
    return "\n".join([*lines, ""])


def _wrapped(coverage: Coverage) -> Iterator[str]:
    rows = [row for row in coverage.rows if row.verdict == "wrapped"]
    if all(len(row.models) == 1 for row in rows):  # classes, not models: they have as many blocks as a config says
        yield from ("| class | layouts | class | layouts |", "|---|---|---|---|")
        cells = [f"| `{row.models[0]}` | {_layouts(row.layouts)} " for row in rows]
        half = (len(cells) + 1) // 2
        yield from (left + right + "|" for left, right in zip_longest(cells[:half], cells[half:], fillvalue="| | "))
        return
    yield from ("| class | models | such as | FFNs | layouts |", "|---|---:|---|---:|---|")
    for row in rows:
        fewest, most = row.blocks
        blocks = str(fewest) if fewest == most else f"{fewest} to {most}"
        yield f"| {row.class_name} | {len(row.models)} | {_example(row.models)} | {blocks} | {_layouts(row.layouts)} |"


def _layouts(layouts: tuple[str, ...]) -> str:
    return ", ".join(f"`{layout}`" for layout in layouts)


def _example(models: tuple[str, ...]) -> str:
    return f"`{min(models, key=lambda name: (len(name), name))}`"


_INTRODUCTION = """# Which ViTs it wraps

Every model with attention of the three libraries, checked by `python -m benchmarks.coverage all`: wrapped in all its
blocks, its output in eval mode unchanged (relative difference under 1e-4 in float32), a gradient for every expert,
router and context after a step away from the start, and given back by `unwrap` as it was. For transformers, every
vision class is built small from its real config, `output_hidden_states` gives as many states as before, and an image
is routed in a batch as it is alone. What cannot be wrapped is refused by an error that says why. Models too large to
run here were checked on the meta device, with two of their blocks run for real where that can be chosen.

The same tables, of the version that you have: `covft describe --all timm`, `open_clip` or `transformers`.

An index, as in `layers=`, counts FFNs in the order in which they run: stage after stage in a hierarchical ViT, branch
by branch in one with branches, two for a block with two FFNs. Layouts say how tokens lie in what an FFN gets: `BND`
(images, tokens or rows and columns, width), `BCHW` channels second, `(BP)ND` an image in several rows (windows,
frames, pixels of a patch), `TD` and `1TD` all images of a batch one after another.
"""
