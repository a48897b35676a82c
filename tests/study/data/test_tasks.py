"""Tasks: every answer derived independently from the scene."""

from __future__ import annotations

import re
from collections import Counter

from study.data.scenes import Scene, make_scenes
from study.data.tasks import TASKS, Example, make_examples

ROWS = {"top": 0, "middle": 1, "bottom": 2}
COLUMNS = {"left": 0, "middle": 1, "right": 2}
NUMBERS = ["zero", "one", "two", "three", "four"]


def _coordinates(place: str) -> tuple[int, int]:
    if place == "centre":
        return 1, 1
    row, column = place.split()
    return ROWS[row], COLUMNS[column]


def _facts(scene: Scene) -> list[dict]:
    """List the things of a scene with their cells."""
    return [
        {"kind": t.tile.kind, "is": t.tile.name, "colour": t.tile.colour, "at": divmod(t.cell, 3)} for t in scene.things
    ]


def _named(fact: dict) -> str:
    return {
        "shape": f"{fact['colour']} {fact['is']}",
        "digit": f"digit {fact['is']}",
        "word": f"word {fact['is']}",
        "photo": fact["is"],
    }[fact["kind"]]


def _meant(facts: list[dict], reference: str) -> dict:
    """Resolve `the circle`, `the digit`, `the cat` to one thing."""
    noun = reference.removeprefix("the ")
    found = [f for f in facts if noun == (f["is"] if f["kind"] in ("shape", "photo") else f["kind"])]
    assert len(found) == 1
    return found[0]


def _answer(example: Example, scene: Scene) -> str:
    """Answer an example with no code of the tasks."""
    facts, subject = _facts(scene), example.subject
    if example.task == "existence":
        return "yes" if subject in map(_named, facts) else "no"
    if example.task == "count":
        wanted = {"objects": {"shape", "digit", "word", "photo"}, "shapes": {"shape"}, "photos": {"photo"}}
        return NUMBERS[len([f for f in facts if f["kind"] in wanted[subject]])]
    if example.task == "colour":
        return _meant(facts, subject)["colour"]
    if example.task == "grounding":
        at = _meant(facts, subject)["at"]
        return next(p for p in PLACES if _coordinates(p) == at)
    if example.task == "region":
        return next((_named(f) for f in facts if f["at"] == _coordinates(subject)), "nothing")
    if example.task == "relation":
        first, side, second = re.fullmatch(r"(the \w+) (above|below|left of|right of) (the \w+)", subject).groups()
        (y1, x1), (y2, x2) = (_meant(facts, name)["at"] for name in (first, second))
        true = {"above": y1 < y2, "below": y1 > y2, "left of": x1 < x2, "right of": x1 > x2}
        return "yes" if true[side] else "no"
    if example.task in ("digit", "word"):
        return next(f["is"] for f in facts if f["kind"] == example.task)
    if example.task == "photo":
        (only,) = [f["is"] for f in facts if f["kind"] == "photo"]
        return only
    assert example.task == "caption"
    return " , ".join(_named(f) for f in sorted(facts, key=lambda f: f["at"]))


PLACES = [
    "centre" if (row, column) == ("middle", "middle") else f"{row} {column}" for row in ROWS for column in COLUMNS
]


def test_every_answer_is_right() -> None:
    scenes = make_scenes("train", 300)
    examples = make_examples(scenes)
    assert {e.task for e in examples} == set(TASKS)
    for example in examples:
        assert example.answer == _answer(example, scenes[example.scene]), example
        assert example.subject in example.question


def test_questions_do_not_depend_on_the_other_tasks() -> None:
    scenes = make_scenes("train", 20)
    alone = make_examples(scenes, ("grounding",))
    assert alone == [e for e in make_examples(scenes) if e.task == "grounding"]
    assert make_examples(scenes, seed=1) != make_examples(scenes)


def test_the_same_pictures_get_grounding_and_captioning_questions() -> None:
    examples = make_examples(make_scenes("train", 20))
    pictures = {task: {e.scene for e in examples if e.task == task} for task in ("grounding", "caption")}
    assert pictures["grounding"] == pictures["caption"] == set(range(20))


def test_yes_and_no_are_balanced() -> None:
    examples = make_examples(make_scenes("train", 600), ("existence", "relation"))
    for task in ("existence", "relation"):
        counts = Counter(e.answer for e in examples if e.task == task)
        assert 0.4 < counts["yes"] / (counts["yes"] + counts["no"]) < 0.6


def test_per_task_limits_each_task() -> None:
    examples = make_examples(make_scenes("train", 20), per_task=3)
    assert set(Counter(e.task for e in examples).values()) == {3}
