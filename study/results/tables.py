"""Tables of the studies."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from study.results import contrasts
from study.results.contrasts import Estimate, Term
from study.results.forgetting import forgetting_table
from study.results.formats import NOTHING, Table, counted, interval, number, p_value, plural
from study.results.load import Group
from study.results.studies import GROUPS, PAIR, STUDIES, TITLES, TWELVE, Results, Study, role_of

NOT_RUN = "Not run."
HOW_TO_READ = (
    "In brackets are 95 percent intervals, from a bootstrap over seeds and questions; differences are paired by both. "
    "A row with one seed has an interval over questions alone. *Trained* counts the tower's parameters. *sd* is the "
    "standard deviation of the mean over seeds. *Wins* are tasks with a higher mean, and *p* is their sign test, "
    "two-sided, corrected by Holm over the rows of the table."
)


def tables_of(results: Results, study: Study) -> list[Table]:
    """Return the tables of a study; one that says so if it was not run."""
    if study.name == "forgetting":
        return [forgetting_table(results, study)]
    parts = results.parts(study)
    if not parts:
        return [Table(study.title, [""], notes=[NOT_RUN])]
    found = [summary(results, study, parts)]
    if study.name in ("methods", "controls"):
        found.append(by_task(results, study, parts))
    return found


def all_tables(results: Results) -> list[Table]:
    """Return the tables of all studies, in their order."""
    return [table for study in STUDIES.values() for table in tables_of(results, study)]


def scored_tasks(groups: list[Group]) -> tuple[str, ...]:
    """Return those of the twelve tasks that every group of a part was scored on."""
    return contrasts.common(TWELVE, *groups)


def gain(group: Group, reference: Group, tasks: tuple[str, ...]) -> list[Term]:
    """Return the terms of a difference."""
    return [Term(1, group, tasks), Term(-1, reference, tasks)]


def summary(results: Results, study: Study, parts: dict[Hashable, list[Group]]) -> Table:
    """Tabulate group means, the mean, and the differences to the references."""
    controls = study.name == "controls"
    header = ["", *([study.part_title] if study.part else []), "mean"]
    for role in study.references:
        header += [f"minus {role}", "wins", "p"]
    header += [*(["of the gain"] if controls else []), *TITLES.values(), "sd", "seeds", "trained"]
    table = Table(study.title, header)
    for part, groups in parts.items():
        tasks = scored_tasks(groups)
        references = {role: results.reference(study, groups, role) for role in study.references}
        found = {role: _wins(groups, reference, tasks) for role, reference in references.items()}
        start = len(table.rows)
        for group in _in_order(study, groups, tasks):
            overall = contrasts.mean(group, tasks)
            row = [group.label, *([study.part_form.format(part)] if study.part else [])]
            row.append(interval(overall, difference=False))
            for role, reference in references.items():
                row += _compared(group, reference, tasks, *found[role])
            row += [remaining(group, references, tasks)] if controls else []
            row += [_group_mean(group, name, tasks) for name in TITLES]
            row.append(NOTHING if overall is None or overall.deviation is None else number(overall.deviation))
            table.rows.append([*row, str(len(group.rows)), f"{group.first.trained.get('tower', 0):,}"])
        _mark_best(table, start, header.index("mean"))
        if set(tasks) != set(TWELVE):
            where = f" with {study.part_title} {study.part_form.format(part)}" if study.part else ""
            table.notes.append(f"Means{where} are over {plural(len(tasks), 'task')}: {', '.join(tasks)}.")
    if controls:
        table.notes.append(
            "*Of the gain*: how much of CoVFT's gain over the frozen tower the row has; nothing where the interval of "
            "that gain contains 0."
        )
    return table


def by_task(results: Results, study: Study, parts: dict[Hashable, list[Group]]) -> Table:
    """Tabulate the scores of every task, and the floors."""
    groups = [group for each in parts.values() for group in each]
    known = {task for group in groups for task in group.tasks}
    tasks = [task for task in (*TWELVE, *PAIR, *sorted(known - {*TWELVE, *PAIR})) if task in known]
    table = Table(f"{study.title}, by task", ["", *tasks])
    for group in groups:
        table.rows.append([group.label, *(number(group.score(t)) if t in group.tasks else NOTHING for t in tasks)])
    for name, floor in floors(results).items():
        table.rows.append([f"floor: {name}", *(number(floor[t]) if t in floor else NOTHING for t in tasks)])
    pair = [task for task in PAIR if task in known]
    table.notes.append(
        "Means over the seeds, in percent of each task's metric, without intervals: compare methods by the table of "
        "differences, not by these." + (f" {' and '.join(pair).capitalize()} are outside the means." if pair else "")
    )
    return table


def _in_order(study: Study, groups: list[Group], tasks: tuple[str, ...]) -> list[Group]:
    """Return the groups of a part: references first, and where they have no order of their own, by their mean."""
    if study.name not in ("methods", "controls") or not tasks:
        return groups
    first = [group for group in groups if role_of(group) in study.references]
    others = [group for group in groups if group not in first]
    return [*first, *sorted(others, key=lambda group: -sum(group.score(task) for task in tasks))]


def floors(results: Results) -> dict[str, dict[str, float]]:
    """Return the floors of each task: the mean over the seeds of the frozen tower, trained as the methods are."""
    frozen = results.main("frozen")
    found: dict[str, dict[str, list[float]]] = {}
    for row in frozen.rows.values() if frozen is not None else ():
        for name, scores in row.floors.items():
            for task, score in scores.items():
                found.setdefault(name.replace("_", " "), {}).setdefault(task, []).append(score)
    return {name: {task: float(np.mean(values)) for task, values in tasks.items()} for name, tasks in found.items()}


def remaining(group: Group, references: dict[str, Group | None], tasks: tuple[str, ...]) -> str:
    """Write how much of CoVFT's gain over the frozen tower a group has."""
    frozen, covft = references["frozen"], references["covft"]
    if frozen is None or covft is None or group.label == frozen.label:
        return NOTHING
    found = contrasts.share(gain(group, frozen, tasks), gain(covft, frozen, tasks))
    return NOTHING if found is None else percent(found)


def percent(found: Estimate) -> str:
    """Write a share and its interval."""
    return f"{found.value:.0f}% [{found.low:.0f},\u00a0{found.high:.0f}]".replace("-", "−")


def _group_mean(group: Group, name: str, tasks: tuple[str, ...]) -> str:
    mine = [task for task in GROUPS[name] if task in tasks]
    return number(float(np.mean([group.score(task) for task in mine]))) if mine else NOTHING


def _wins(
    groups: list[Group], reference: Group | None, tasks: tuple[str, ...]
) -> tuple[dict[str, contrasts.Wins | None], dict[str, float]]:
    if reference is None:
        return {}, {}
    found = {g.label: contrasts.wins(g, reference, tasks) for g in groups if g.label != reference.label}
    return found, contrasts.holm(found)


def _compared(
    group: Group,
    reference: Group | None,
    tasks: tuple[str, ...],
    found: dict[str, contrasts.Wins | None],
    corrected: dict[str, float],
) -> list[str]:
    if reference is None or group.label == reference.label:
        return [NOTHING] * 3
    apart = contrasts.difference(group, reference, tasks)
    return [interval(apart), counted(found[group.label]), p_value(corrected.get(group.label))]


def _mark_best(table: Table, start: int, column: int) -> None:
    """Mark the highest number of a column, from a row on."""
    values = {
        y: float(table.rows[y][column].split()[0]) for y in range(start, len(table.rows)) if table.rows[y][column]
    }
    if len(values) > 1:
        table.strong |= {(y, column) for y, value in values.items() if value == max(values.values())}
