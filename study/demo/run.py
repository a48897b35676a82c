"""The demo: a few runs of the study, their scores with intervals, and a page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from covft.errors import CoVFTError
from covft.utils.files import write_text
from study.backbone_check import check_backbone
from study.demo.inspection import MODEL, SCENES, Inspector
from study.demo.page import Contents, checks, write_page
from study.demo.scores import difference_table, floors_of, groups_of_runs, score_table
from study.demo.settings import DemoSettings
from study.results.load import Row, read_rows
from study.runs.rows import Rows
from study.runs.tables import chosen, held_out_part
from study.runs.work import Outcome, work

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

JOBS = 2
PAGE, TABLES, PICTURES = "index.html", "tables.md", "pictures"
_WIDTH = 150  # of a table, at least


class UnfinishedError(CoVFTError, RuntimeError):
    """Runs of the demo that have no row."""


def run_demo(settings: DemoSettings | None = None, console: Console | None = None) -> Contents:
    """Run what has no row yet, print scores with intervals, and write the page, the tables and the model of covft.

    Args:
        settings: Settings; the default is that of `make demo`.
        console: Console for the tables; default standard output.

    Returns:
        What the page shows.

    Raises:
        UnfinishedError: If a run fails.
    """
    from rich.console import Console

    settings = settings or DemoSettings()
    console = console or Console()
    console.width = max(console.width, _WIDTH)
    began = time.perf_counter()
    runs = settings.runs()
    folder, rows = settings.output, Rows(settings.output / "rows")
    some = next(iter(runs.values()))
    console.print(f"{len(runs)} runs of {some.steps} steps of {some.batch} questions; what is finished is kept.")
    inspector = Inspector(folder)
    outcome = work(settings.planned(), rows, jobs=JOBS, show=settings.show, inspect=inspector)
    found = _finished(rows.folder, outcome)

    groups = groups_of_runs(found, runs)
    frozen = next((found[run.name] for name, run in runs.items() if name == "frozen"), None)
    tables = [score_table(groups, floors_of(some, frozen))]
    if (differences := difference_table(groups)).rows:
        tables.append(differences)
    for table in tables:
        console.print(table.rich())
    backbone = check_backbone(settings.backbone_run())

    part = held_out_part(some)
    seconds = time.perf_counter() - began
    contents = Contents(groups, tables, part.pictures, chosen(part, some.tasks), backbone, seconds)
    for line in checks(contents):
        console.print(line, soft_wrap=True)
    write_text(folder / TABLES, "\n\n".join(table.markdown() for table in tables) + "\n")
    write_page(folder / PAGE, contents)
    _write_pictures(folder / PICTURES, part.pictures[:SCENES])
    console.print(f"Done in {seconds:.0f} seconds. Open {folder / PAGE}", soft_wrap=True)
    if (folder / MODEL).is_dir():
        console.print(f"Or ask: covft chat {folder / MODEL} --image {folder / PICTURES / '0.png'}", soft_wrap=True)
    return contents


def _write_pictures(folder: Path, pictures: np.ndarray) -> None:
    """Write pictures, `(N, H, W, 3)`, as `0.png` and so on."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")


def _finished(folder: Path, outcome: Outcome) -> dict[str, Row]:
    """Return the rows by name.

    Raises:
        UnfinishedError: If a run has none.
    """
    if outcome.failed or outcome.left:
        raise UnfinishedError(
            "Not all runs are finished, and the finished ones are kept.",
            expected="a row of each run",
            got=", ".join([*(f"{name} failed" for name in outcome.failed), *(f"{n} left" for n in outcome.left)]),
            fix="python -m study  # with the same options, to go on",
        )
    return {row.name: row for row in read_rows(folder)}
