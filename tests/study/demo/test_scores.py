"""Tables of the demo, from planted hits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from study.data.tasks import TASKS
from study.demo.scores import difference_table, floors_of, groups_of_runs, score_table
from study.demo.settings import DemoSettings
from study.results.load import Row
from study.runs.tables import chosen, held_out_part, training_part

QUESTIONS = 40
SMALL = {"train_scenes": 24, "held_out_scenes": 24, "held_out_questions": 4, "batch": 8}


def _rows(runs, right):
    """Return a row of each run with the first questions of each task right, so many as `right` says for the run."""
    rows = {}
    for name, run in runs.items():
        hits = {task: (np.arange(QUESTIONS) < right[name]).astype(float) for task in TASKS}
        scores = {task: 100 * float(found.mean()) for task, found in hits.items()}
        rows[run.name] = Row(run.name, run.label, ("demo",), run.to_dict(), run.seed, "test", scores, hits)
    return rows


@pytest.fixture
def groups():
    runs = DemoSettings().runs()
    return groups_of_runs(_rows(runs, {"frozen": 10, "full": 20, "covft": 30, "covft-shuffled": 30}), runs)


def test_scores_stand_with_their_intervals_and_floors(groups) -> None:
    table = score_table(groups, {"no_image": dict.fromkeys(TASKS, 12.5), "no_question": {"count": 5.0}})
    assert table.header == [
        "task", "frozen", "full", "covft", "covft, texts shuffled", "without the image", "without the question",
    ]  # fmt: skip
    cells = {row[0]: row[1:] for row in table.rows}
    assert set(cells) == {*TASKS, "mean"}
    assert [row[0] for row in table.rows][-3:] == ["mean", "grounding", "caption"]
    low, high = _interval(cells["count"][0], 25.0)
    # of a share p of n questions, about p -+ 1.96 sqrt(p (1 - p) / n)
    assert low == pytest.approx(25 - 13.4, abs=2.5)
    assert high == pytest.approx(25 + 13.4, abs=2.5)
    assert cells["count"][-2:] == ["12.5", "5.0"]
    low, high = _interval(cells["mean"][1], 50.0)
    assert high - low == pytest.approx(2 * 15.5 / np.sqrt(12), abs=1.5)
    assert cells["mean"][-2:] == ["12.5", ""]  # a mean of some tasks would not be the mean
    places = {row[0]: y for y, row in enumerate(table.rows)}
    assert {x for y, x in table.strong if y == places["count"]} == {3, 4}


def test_differences_are_paired_by_question(groups) -> None:
    rows = {row[0]: row[1:] for row in difference_table(groups).rows}
    assert list(rows) == [
        "full, minus frozen",
        "covft, minus frozen",
        "covft, minus full",
        "covft, minus covft, texts shuffled",
    ]
    # a quarter of the questions of each of twelve tasks
    found = rows["full, minus frozen"]
    low, high = _interval(found[0].replace("+", ""), 25.0)
    assert high - low == pytest.approx(2 * 13.4 / np.sqrt(12), abs=1.5)
    assert found[1:] == ["12/12", "0/12"]
    # the same answers: the questions that were drawn do not matter
    assert rows["covft, minus covft, texts shuffled"] == ["0.0 [0.0,\u00a00.0]", "0/12", "0/12"]


def test_only_differences_of_what_was_run_are_shown() -> None:
    runs = DemoSettings(methods=("frozen", "covft")).runs()
    table = difference_table(groups_of_runs(_rows(runs, {"frozen": 10, "covft": 20}), runs))
    assert [row[0] for row in table.rows] == ["covft, minus frozen"]


def test_floors_are_the_better_of_two_guesses() -> None:
    run = DemoSettings(methods=("frozen",), fields={**SMALL, "tasks": ("count", "caption")}).runs()["frozen"]
    counts = Counter(e.answer for e in chosen(training_part(run), ("count",)))
    (most, _), *_ = counts.most_common(1)
    asked = chosen(held_out_part(run), ("count",))
    guessed = 100 * sum(e.answer == most for e in asked) / len(asked)
    assert floors_of(run, None)["no_question"] == {"count": pytest.approx(guessed)}
    (row,) = _rows({"frozen": run}, {"frozen": 10}).values()
    model = {"no_image": {"count": 100.0, "caption": 7.0}, "no_question": {"count": guessed / 2, "caption": 3.0}}
    row.floors.update(model)
    found = floors_of(run, row)
    assert found["no_image"] == {"count": 100.0, "caption": 7.0}
    assert found["no_question"] == {"count": pytest.approx(guessed), "caption": 3.0}


def _interval(cell: str, value: float) -> tuple[float, float]:
    number, low, high = cell.replace("\u00a0", " ").replace("[", "").replace("]", "").replace(",", "").split()
    assert float(number) == value
    return float(low), float(high)
