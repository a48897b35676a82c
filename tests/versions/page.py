"""The page docs/versions.md, from the results alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tests.versions.floors import ROOT, floors, project, version
from tests.versions.rows import FEATURES, ROWS, SLOW
from tests.versions.running import OUTCOMES, RESULTS

PAGE = ROOT / "docs" / "versions.md"
OTHERS = {  # heading: distribution
    "numpy": "numpy",
    "hub": "huggingface_hub",
    "tokenizers": "tokenizers",
    "accelerate": "accelerate",
    "peft": "peft",
    "sentence-transformers": "sentence-transformers",
    "timm": "timm",
    "open_clip": "open_clip_torch",
}
TEXT = """\
# Tested releases

covft needs torch {torch} or later, and Python {python} or later. With transformers {transformers} or later it wraps
ViTs, reads texts, saves and loads; `attach`, `tune`, the callback and the trainer need transformers {training}.

Each row is an environment of its own, filled by pip, on CPU. A cell has the tests that passed there; `–` was not run.

{support}

{notes}The other packages of each row:

{packages}

The tests, in `tests/`:

- wrap: {wrap}
- text: {text}
- save and load: {saving}
- attach and generate: {attach}
- train: {train}
- tune: {tune}
- chat, merge, export, evaluate: {use}

Skipped are tests of a model or an option that the release lacks.

`make versions` runs all rows, `python -m tests.versions newest` one. This page is made from the results, in
`tests/versions/results`.
"""


def results(folder: Path = RESULTS) -> list[dict]:
    """Read the results, the oldest transformers first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: (order(result, "transformers"), order(result, "torch"), result["row"]))


def order(result: dict, package: str) -> tuple[int, ...]:
    """Return a version as a sort key; a row that installed nothing comes first."""
    return version(result["versions"].get(package) or "0")


def page(rows: list[dict] | None = None) -> str:
    """Return the page of these results, by default of all."""
    rows = results() if rows is None else rows
    names = dict(
        zip(("wrap", "text", "saving", "attach", "train", "tune", "use"), map(listed, FEATURES.values()), strict=True)
    )
    return TEXT.format(
        torch=floors()["torch"],
        python=project()["requires-python"].removeprefix(">="),
        transformers=floors("transformers")["transformers"],
        training=floors("train")["transformers"],
        support=table(["transformers", "torch", "Python", *FEATURES, "date"], [support(row) for row in rows]),
        notes=notes(rows),
        packages=table(["row", *OTHERS], [packages(row) for row in rows]),
        **names,
    )


def support(result: dict) -> list[str]:
    """Return the cells of a row of the support table."""
    versions = result["versions"]
    found = [versions.get(name) or "not installed" for name in ("transformers", "torch", "python")]
    cells = [cell(result, folders) for folders in FEATURES.values()]
    return [*found, *cells, result["date"]]


def cell(result: dict, folders: tuple[str, ...]) -> str:
    """Say how the tests of one feature went."""
    counts = [result["tests"][folder] for folder in folders if folder in result["tests"]]
    passed, failed, skipped = (sum(count[outcome] for count in counts) for outcome in OUTCOMES)
    if not counts:
        return "–"
    if failed:
        return f"**{failed} failed**, {passed} passed"
    return f"{passed}, {skipped} skipped" if skipped else f"{passed}"


def packages(result: dict) -> list[str]:
    """Return the cells of a row of the table of packages."""
    return [f"`{result['row']}`", *(result["versions"].get(name) or "–" for name in OTHERS.values())]


def notes(rows: list[dict]) -> str:
    """Say what a row left out, where it ran on another Python, and what failed."""
    found = left_out("No row runs", SLOW)
    for result in rows:
        row = ROWS[result["row"]]
        ran = result["versions"].get("python", row.python)
        if not f"{ran}.".startswith(f"{row.python}."):
            found.append(f"`{row.name}` is meant for Python {row.python}; it ran on {ran}.")
        found += left_out(f"`{row.name}` leaves out", row.without)
        found += [f"`{row.name}` failed: `{failure}`" for failure in result["failures"][:5]]
        found += [f"`{row.name}` failed in {len(result['failures']) - 5} more."] * (len(result["failures"]) > 5)
    return "".join(f"- {line}\n" for line in found) + "\n"


def left_out(begin: str, tests: dict[str, str]) -> list[str]:
    """Say which tests are left out, one line per reason."""
    reasons = dict.fromkeys(tests.values())
    return [f"{begin} {listed([test for test in tests if tests[test] == why])}: {why}." for why in reasons]


def listed(paths: Iterable[str]) -> str:
    """Name files and folders of tests."""
    return ", ".join(f"`{path.removeprefix('tests/')}`" for path in paths)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
