"""CIDEr of captions in a row: at once where pycocoevalcap is installed, else later, from the captions."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from study.data.tasks import TASKS
from study.runs.rows import Rows
from study.runs.score import percent, written
from study.runs.settings import RunSettings
from study.runs.tables import chosen, held_out_part


def with_captions(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with scores, floors and hits in place of `found`, which stays while captions have no score.

    Args:
        row: A row with what was found: hits and captions, of the run (`""`), of its floors, and from before.
    """
    if "found" not in row:
        return row
    can = find_spec("pycocoevalcap") is not None
    settings = RunSettings.from_dict(row["settings"])
    done = {}
    for name, found in row["found"].items():
        hits = dict(found["hits"])
        for task, captions in found["captions"].items():
            if can and captions:
                hits[task] = _cider(settings, task, captions)
        done[name] = {task: hits[task] for task in TASKS if task in hits}
    row = {**row, "scores": percent(done[""]), "hits": written(done[""])}
    if "before" in done:
        row["before"] = written(done["before"])
    floors = {name: percent(hits) for name, hits in done.items() if name not in ("", "before")}
    if floors:
        row["floors"] = floors
    if can or not any(found["captions"] for found in row["found"].values()):
        del row["found"]
    return row


def complete(rows: Rows) -> None:
    """Score captions of rows that were made where pycocoevalcap is not installed, if it is here."""
    if find_spec("pycocoevalcap") is not None:
        for row in rows.read():
            if "found" in row:
                rows.write(with_captions(row))


def _cider(settings: RunSettings, task: str, captions: list[str]) -> list[float]:
    from covft.metrics import cider

    asked = chosen(held_out_part(settings), (task,))
    return cider(captions, [[example.answer] for example in asked])
