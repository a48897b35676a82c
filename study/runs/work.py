"""Several processes on one list of runs.

What they share is made once, before they are forked (`shared.py`); the parent never touches the device.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study.runs.plan import Planned
from study.runs.rows import Rows
from study.runs.tables import draw

if TYPE_CHECKING:
    from study.runs.run import Inspect

_SHOWN_TRACES = 3


@dataclass(frozen=True)
class Outcome:
    """What became of the runs.

    Attributes:
        finished: Names of those that were run.
        failed: The error of each that failed.
        left: Names of those that time has not sufficed for, or that another command has.
    """

    finished: list[str]
    failed: dict[str, str]
    left: list[str]


def work(
    planned: Sequence[Planned],
    rows: Rows,
    *,
    device: str = "cpu",
    jobs: int = 1,
    time_limit: float | None = None,
    show: bool = True,
    inspect: Inspect | None = None,
) -> Outcome:
    """Run what has no row yet.

    Args:
        planned: The runs, in the order in which they are begun.
        rows: Where their rows go.
        device: `cpu` or `cuda`.
        jobs: Processes.
        time_limit: Seconds after which all stop; runs that are not finished then leave nothing.
        show: Whether to show progress.
        inspect: Looks at each trained model, in the process that trained it (`study.runs.run.run`).
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    missing = {run.name for run in rows.missing(one.run for one in planned)}
    for one in planned:
        if one.run.name not in missing:
            rows.add_studies(one.run.name, one.studies)
    to_do = [one for one in planned if one.run.name in missing]
    threads = 1 if device == "cuda" else max(1, multiprocessing.cpu_count() // jobs)
    for one in to_do:
        draw(one.run)
    at_once = min(jobs, len(to_do))
    if device == "cpu" and at_once > 1:
        from study.runs.shared import prepare

        prepare([one.run for one in to_do], jobs=jobs, threads=threads, show=show)
    context = multiprocessing.get_context("fork")
    events: Any = context.Queue()
    processes = [
        context.Process(target=_worker, args=(to_do, rows, device, threads, deadline, events, inspect), daemon=True)
        for _ in range(at_once)
    ]
    for process in processes:
        process.start()
    finished, failed = _watch(processes, events, to_do, show)
    left = [name for name in (run.name for run in rows.missing(one.run for one in to_do)) if name not in failed]
    return Outcome(finished, failed, left)


def _worker(
    planned: Sequence[Planned],
    rows: Rows,
    device: str,
    threads: int,
    deadline: float | None,
    events: Any,
    inspect: Inspect | None,
) -> None:
    """Claim and run what is left, until nothing is or time is up."""
    import torch

    from study.runs.run import run
    from study.runs.score import mean_of
    from study.runs.train import OutOfTime

    torch.set_num_threads(threads)
    longest = 0.0
    tried: set[str] = set()
    for one in planned:
        name = one.run.name
        if deadline is not None and time.monotonic() + 0.8 * longest > deadline:
            break
        with rows.claim(name) as claimed:
            if not claimed or name in tried:
                continue
            tried.add(name)
            began = time.monotonic()
            try:
                row = run(
                    one.run, one.studies, device=device, deadline=deadline, inspect=inspect,
                    report=lambda step, name=name: events.put(("step", name, step)),
                )  # fmt: skip
            except OutOfTime:
                break
            except Exception:
                events.put(("failed", name, traceback.format_exc()))
                continue
            rows.write(row)
            longest = max(longest, time.monotonic() - began)
            events.put(("finished", name, mean_of(row["scores"])))
    events.close()
    events.join_thread()


def _watch(
    processes: Sequence[Any], events: Any, planned: Sequence[Planned], show: bool
) -> tuple[list[str], dict[str, str]]:
    """Show what the processes report until all have ended."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    finished: list[str] = []
    failed: dict[str, str] = {}
    steps = {one.run.name: one.run.steps for one in planned}
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not show, transient=False) as progress:
        total = progress.add_task("runs", total=len(planned))
        bars: dict[str, Any] = {}
        while True:
            alive = any(process.is_alive() for process in processes)
            try:
                kind, name, value = events.get(timeout=0.5 if alive else 0.05)
            except queue.Empty:
                if not alive:
                    break
                continue
            if kind == "step":
                if name not in bars:
                    bars[name] = progress.add_task(f"  {name}"[:44], total=steps[name])
                progress.update(bars[name], completed=value)
                continue
            if name in bars:
                progress.remove_task(bars.pop(name))
            progress.advance(total)
            if kind == "finished":
                finished.append(name)
                progress.console.print(f"{name}: mean {value:.1f}")
            else:
                failed[name] = value
                last = value.strip().splitlines()[-1]
                progress.console.print(f"{name} failed: {last}", style="red")
                if len(failed) <= _SHOWN_TRACES:
                    progress.console.print(value, markup=False)
    for process in processes:
        process.join()
    return finished, failed
