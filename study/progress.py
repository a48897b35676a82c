"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int, show: bool = True) -> Iterator[Callable[[int, float | None], None]]:
    """A bar for one piece of work.

    Yields:
        A function to call after each step with the step's number (from 0) and its loss, or None.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, disable=not show) as progress:
        job = progress.add_task(title, total=total, note="")

        def report(step: int, loss: float | None = None) -> None:
            note = "" if loss is None else f"loss {loss:.3f}"
            progress.update(job, completed=step + 1, note=note)

        yield report
