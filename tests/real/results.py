"""The results of a run: a JSON file for each engine, and the page that is made from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.real.environments import ROOT

FOLDER = Path(__file__).with_name("results")
PAGE = ROOT / "docs" / "engines.md"
NAMES = {
    "internvl": "InternVL's internvl_chat",
    "lightning": "Lightning",
    "llama_factory": "LLaMA-Factory",
    "llava": "LLaVA",
    "lmms_eval": "lmms-eval",
    "ms_swift": "ms-swift",
    "trl": "TRL",
    "vlmevalkit": "VLMEvalKit",
}

_HEAD = """\
# Trainers and codebases that were run

`make real` runs covft inside the trainers themselves: it builds an environment for each, makes a tiny model and tiny
data, and runs the commands of the guides, with model, data and sizes replaced. This page is made from the results of
the last runs.
"""


@dataclass
class Result:
    """What one run of an engine gave."""

    engine: str
    about: str
    date: str
    outcome: str = "passed"  # or "failed", "skipped"
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path = FOLDER) -> None:
        """Write the file of this engine, aside first, so that an interrupted run leaves the last one."""
        folder.mkdir(exist_ok=True)
        aside = folder / f".{self.engine}.json"
        aside.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(folder / f"{self.engine}.json")


def read(folder: Path = FOLDER) -> list[Result]:
    """Return the results that are there, by name of the engine."""
    return [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("[!.]*.json"))]


def page(results: list[Result]) -> str:
    """Make the page."""
    if not results:
        return f"{_HEAD}\nNone was run yet.\n"
    rows = [
        f"| [{NAMES[r.engine]}](#{_anchor(r.engine)}) | {r.outcome} | {len(r.checks)} | {r.date} | {_versions(r)} |"
        for r in results
    ]
    table = ["| | result | checks | date | versions |", "|---|---|---|---|---|", *rows]
    return "\n".join([_HEAD, *table, "", *(line for result in results for line in _section(result))])


def _anchor(engine: str) -> str:
    return NAMES[engine].lower().replace("'", "").replace(" ", "-")


def _versions(result: Result) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items())


def _section(result: Result) -> list[str]:
    lines = [f"## {NAMES[result.engine]}", "", result.about, ""]
    if result.outcome != "passed":
        lines += [f"**{result.outcome.capitalize()}**: {_cell(result.reason)}", ""]
    if result.commands:
        lines += ["| step | command of | s |", "|---|---|---|"]
        lines += [f"| {_cell(c['title'])} | {_guide(c)} | {c['seconds']:.0f} |" for c in result.commands]
        lines += [""]
    if result.checks:
        lines += ["| check | value | |", "|---|---|---|"]
        lines += [
            f"| {_cell(c['what'])} | {_cell(c['value'])} | {'yes' if c['holds'] else '**no**'} |" for c in result.checks
        ]
        lines += [""]
    return lines


def _guide(command: dict[str, Any]) -> str:
    page = command.get("page")
    return f"[{Path(page).stem}]({page})" if page else ""


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
