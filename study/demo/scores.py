"""Scores and differences of the demo's runs, with intervals over the held-out questions."""

from __future__ import annotations

from collections.abc import Mapping

from study.data.floors import most_frequent_answers, share_right
from study.data.tasks import TASKS
from study.demo.settings import label_of
from study.results import contrasts
from study.results.formats import NOTHING, Table, counted, interval, number
from study.results.load import Group, Row
from study.results.studies import PAIR, TWELVE
from study.runs.settings import RunSettings
from study.runs.tables import chosen, held_out_part, training_part

MEAN = "mean"
FLOORS = {"no_image": "without the image", "no_question": "without the question"}
DIFFERENCES = (("full", "frozen"), ("covft", "frozen"), ("covft", "full"), ("covft", "covft-shuffled"))


def groups_of_runs(rows: Mapping[str, Row], runs: Mapping[str, RunSettings]) -> dict[str, Group]:
    """Return each run as a group of one seed, under its name in the demo.

    Args:
        rows: The rows, by the runs' names.
        runs: The runs, by their names in the demo.
    """
    return {name: Group(label_of(run), {run.seed: rows[run.name]}) for name, run in runs.items()}


def score_table(groups: Mapping[str, Group], floors: Mapping[str, Mapping[str, float]]) -> Table:
    """Tabulate the score of each task with its interval, the mean outside the conflict, and the floors."""
    some = next(iter(groups.values()))
    tasks = contrasts.common(TASKS, *groups.values())
    counted_tasks = mean_tasks(groups)
    table = Table(
        f"Right answers on {some.first.split} scenes, %, with 95 percent intervals over the questions",
        ["task", *(group.label for group in groups.values()), *(FLOORS[name] for name in floors)],
    )
    outside = [task for task in tasks if task in PAIR]
    for task in [*(task for task in tasks if task not in PAIR), MEAN, *outside]:
        wanted = counted_tasks if task == MEAN else (task,)
        found = [contrasts.mean(group, wanted) for group in groups.values()]
        values = [None if each is None else each.value for each in found]
        if len(set(values)) > 1:
            best = max(value for value in values if value is not None)
            table.strong |= {(len(table.rows), 1 + place) for place, value in enumerate(values) if value == best}
        below = [_mean(floor, wanted) for floor in floors.values()]
        table.rows.append([task, *(interval(each, difference=False) for each in found), *below])
    if outside and len(counted_tasks) < len(tasks):
        table.notes.append(f"The mean is without {' and '.join(outside)}; caption has CIDEr, which may be above 100.")
    return table


def difference_table(groups: Mapping[str, Group]) -> Table:
    """Tabulate the paired differences of the means, with intervals, and on how many tasks each method is better."""
    table = Table(
        "Differences of the mean, points, paired by question, with 95 percent intervals",
        ["", "difference", "tasks better", "tasks worse"],
    )
    for ours, theirs in DIFFERENCES:
        if ours in groups and theirs in groups:
            a, b = groups[ours], groups[theirs]
            tasks = mean_tasks(groups)
            won = contrasts.wins(a, b, tasks)
            worse = NOTHING if won is None else f"{won.lost}/{len(tasks)}"
            row = [f"{a.label}, minus {b.label}", interval(contrasts.difference(a, b, tasks)), counted(won), worse]
            table.rows.append(row)
    return table


def mean_tasks(groups: Mapping[str, Group]) -> tuple[str, ...]:
    """Return the tasks of the mean: those of the twelve that were trained; of the conflict alone, its own."""
    return contrasts.common(TWELVE, *groups.values()) or contrasts.common(TASKS, *groups.values())


def floors_of(run: RunSettings, frozen: Row | None) -> dict[str, dict[str, float]]:
    """Return what is right without the image and without the question, the better of two guesses for each task.

    One is the most frequent training answer, to the same question or to its task. The other is the frozen model, shown
    a blank image or not given the question.

    Args:
        run: Any run, for its questions.
        frozen: The row of the frozen tower; None if it was not run.
    """
    train, asked = (chosen(part, run.tasks) for part in (training_part(run), held_out_part(run)))
    exact = [example for example in asked if TASKS[example.task].metric != "cider"]
    found = {}
    for name, with_question in (("no_image", True), ("no_question", False)):
        guessed = share_right(exact, most_frequent_answers(train, exact, with_question=with_question)) if exact else {}
        model = {} if frozen is None else frozen.floors[name]
        both = {task: max(s[task] for s in (guessed, model) if task in s) for task in {**guessed, **model}}
        found[name] = {task: both[task] for task in TASKS if task in both}
    return found


def _mean(scores: Mapping[str, float], tasks: tuple[str, ...]) -> str:
    known = [scores[task] for task in tasks if task in scores]
    return number(sum(known) / len(known)) if len(known) == len(tasks) else NOTHING
