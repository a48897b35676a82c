"""Floors: a worked example, and the study's own, far below a reader."""

from __future__ import annotations

from collections import Counter

import pytest

from study.data.floors import answers_without_question, data_floors, floors_table, most_frequent_answers, share_right
from study.data.scenes import make_scenes
from study.data.tasks import TASKS, Example, make_examples


def _example(question: str, answer: str, task: str = "count", pair: int | None = None) -> Example:
    return Example(task, 0, question, answer, "", pair)


def test_a_worked_example() -> None:
    train = [_example("q1", "two"), _example("q1", "two"), _example("q2", "one"), _example("q2", "one")]
    train += [_example("q2", "one"), _example("q3", "yes", "existence"), _example("q1", "cat", "photo")]
    asked = [_example("q1", "two"), _example("q2", "two"), _example("new", "one"), _example("q3", "no", "existence")]
    assert most_frequent_answers(train, asked, with_question=True) == ["two", "one", "one", "yes"]
    assert most_frequent_answers(train, asked, with_question=False) == ["one", "one", "one", "yes"]
    assert data_floors(train, asked) == {
        "no_image": {"count": pytest.approx(200 / 3), "existence": 0.0},
        "no_question": {"count": pytest.approx(100 / 3), "existence": 0.0},
    }


def test_a_pair_is_right_if_both_are() -> None:
    drawn = ((0, "big"), (0, "small"), (1, "red"), (1, "blue"))
    pairs = [_example("q", answer, "pairs", pair) for pair, answer in drawn]
    assert share_right(pairs, ["big", "small", "red", "red"]) == {"pairs": 50.0}


def test_the_floors_of_the_study_are_low_and_its_answers_balanced() -> None:
    train = make_examples(make_scenes("train", 600))
    scenes = make_scenes("validation", 150)
    examples = make_examples(scenes)
    highest = {"existence": 62, "choice": 45, "choice_german": 45, "count": 50, "pairs": 0, "caption": 5}
    for floors in data_floors(train, examples).values():
        assert set(floors) == set(TASKS)
        for task, share in floors.items():
            assert share <= highest.get(task, 40), task
    for task, answers in (("existence", 2), ("choice", 3), ("relation", 4)):
        shares = Counter(e.answer for e in train if e.task == task)
        assert len(shares) == answers
        assert max(shares.values()) < 1.35 * min(shares.values())
    known = answers_without_question(scenes[:15], [e for e in examples if e.scene < 15], draws=3)
    shares = share_right([e for e in examples if e.scene < 15], known)
    assert shares["photo"] == shares["caption"] == 100.0
    assert shares["grounding"] < 90.0
    assert floors_table(train, scenes[:6], [e for e in examples if e.scene < 6]).count("\n") == len(TASKS)
