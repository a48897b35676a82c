"""What was run, as tables: studies, settings, tasks."""

from __future__ import annotations

from typing import Any

import numpy as np

from study.data.tasks import TASKS
from study.results.formats import NOTHING, Table, number, seeds_of
from study.results.studies import STUDIES, TITLES, Results
from study.results.tables import floors

_CEILING, _NEAR = 95, 5  # points


def run_table(results: Results) -> Table:
    """Tabulate the number of runs of each study."""
    table = Table("What was run", ["study", "groups", "seeds", "runs", "minutes per run"])
    for study in STUDIES.values():
        groups = [group for group in results.groups if study.name in group.studies]
        rows = [row for group in groups for row in group.rows.values()]
        minutes = [sum(row.seconds.values()) / 60 for row in rows if row.seconds]
        seeds = seeds_of({len(group.rows) for group in groups}).removesuffix("s").removesuffix(" seed")
        known = [str(len(groups)), seeds, str(len(rows)), number(float(np.median(minutes))) if minutes else NOTHING]
        table.rows.append([study.title, *(known if groups else ["not run", *[NOTHING] * 3])])
    if results.groups:
        table.notes.append("A run may belong to several studies. *Minutes per run* is the median.")
    return table


def settings_table(results: Results) -> Table:
    """Tabulate the settings of the main group of CoVFT, with what other groups have instead."""
    main = results.main("covft") or next(iter(results.groups), None)
    table = Table(
        "Settings", ["setting", "value", "in other runs"], notes=[] if main else ["Not run."], text=frozenset(range(3))
    )
    for name, value in (main.settings if main else {}).items():
        others = dict.fromkeys(_shown(group.settings.get(name)) for group in results.groups)
        others.pop(_shown(value), None)
        table.rows.append([f"`{name}`", _shown(value) or "none", "; ".join(each or "none" for each in others)])
    return table


def tasks_table(results: Results) -> Table:
    """Tabulate the tasks: what they test, questions, floors, and the range of the methods."""
    counts = {task: len(row.hits[task]) for row in results.rows for task in row.hits}
    known = floors(results)
    told = ["task", "group", "tests", "metric", "questions"]
    table = Table("Tasks", [*told, *(f"floor: {name}" for name in known), "lowest", "highest"])
    table.text = frozenset(range(4))
    for task in TASKS.values():
        scores = [g.score(task.name) for g in results.groups if task.name in g.tasks and "methods" in g.studies]
        row = [f"`{task.name}`", TITLES.get(task.group, "Conflict"), task.tests.replace("; ", "<br>"), task.metric]
        row.append(str(counts.get(task.name, "not run")))
        row += [number(floor[task.name]) if task.name in floor else NOTHING for floor in known.values()]
        table.rows.append([*row, *([number(min(scores)), number(max(scores))] if scores else [NOTHING] * 2)])
    table.notes.append(
        "*Tests* says what a task asks, and which benchmark it stands for. Floors are the scores of the frozen model "
        "shown a grey picture, and of the same model not given the question. *Lowest* and *highest* are over the study "
        "of methods. The two tasks of the conflict are outside the means."
    )
    ends = {
        name: [float(cell) for cell in row[5:] if cell] for name, row in zip(TASKS, table.rows, strict=True) if row[-1]
    }
    floored = [name for name, (*low, _, highest) in ends.items() if low and highest <= max(low) + _NEAR]
    percents = [name for name, task in TASKS.items() if task.metric != "cider"]  # CIDEr has no ceiling
    full = [name for name, (*_, highest) in ends.items() if highest > _CEILING and name in percents]
    for tasks, told in (
        (floored, f"Within {_NEAR} points of its floor for every method"),
        (full, f"Above {_CEILING} for some method"),
    ):
        if tasks:
            said = ", ".join(f"`{task}` ({_best(results, task)})" for task in tasks)
            table.notes.append(f"{told}, so that it hardly tells methods apart: {said}.")
    return table


def _best(results: Results, task: str) -> str:
    """Say which of all runs is best at a task."""
    best = max((group for group in results.groups if task in group.tasks), key=lambda group: group.score(task))
    return f"of all runs, at most {number(best.score(task))}: {best.label}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_shown(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        shown = [_shown(each) for each in value]
        return ", ".join(shown) if len(shown) <= 6 else f"{len(shown)} of them"
    return f"{value:g}" if isinstance(value, float) else NOTHING if value is None else str(value)
