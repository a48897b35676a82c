"""Tasks: every answer derived independently from the scene; pairs, German, tasks of your own."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import EntryPoint

import pytest

from covft.errors import ConfigError
from study.data import tasks
from study.data.scenes import Scene, make_scenes
from study.data.tasks import TASKS, Example, Task, load_entry_points, make_examples, register

ROWS = {"top": 0, "middle": 1, "bottom": 2}
COLUMNS = {"left": 0, "centre": 1, "right": 2}
NUMBERS = ["zero", "one", "two", "three", "four"]
GERMAN = {
    "kreis": "circle", "rechteck": "rectangle", "dreieck": "triangle", "stern": "star", "kreuz": "cross",
    "katze": "cat", "kaffee": "coffee", "rakete": "rocket", "münzen": "coins", "ziegel": "bricks", "gras": "grass",
    "sterne": "stars", "gesicht": "face",
}  # fmt: skip


def _facts(scene: Scene) -> list[dict]:
    """List the things of a scene with their cells."""
    return [
        {"kind": t.tile.kind, "is": t.tile.name, "colour": t.tile.colour, "at": divmod(t.cell, 3), "small": t.small}
        for t in scene.things
    ]


def _called(fact: dict) -> str:
    return fact["is"] if fact["kind"] in ("shape", "photo") else fact["kind"]


def _named(fact: dict) -> str:
    return {
        "shape": f"{fact['colour']} {fact['is']}",
        "digit": f"digit {fact['is']}",
        "word": f"word {fact['is']}",
        "photo": fact["is"],
    }[fact["kind"]]


def _meant(facts: list[dict], reference: str) -> dict:
    """Resolve `the circle`, `the digit`, `the cat` to one thing."""
    (found,) = [f for f in facts if _called(f) == reference.removeprefix("the ")]
    return found


def _at(fact: dict) -> str:
    row, column = fact["at"]
    return f"{list(ROWS)[row]} {list(COLUMNS)[column]}"


def _lies(first: dict, second: dict, side: str) -> bool:
    """Return whether `first` is on one side of `second`, in its row or column."""
    (y1, x1), (y2, x2) = first["at"], second["at"]
    return {
        "above": x1 == x2 and y1 < y2,
        "below": x1 == x2 and y1 > y2,
        "left": y1 == y2 and x1 < x2,
        "right": y1 == y2 and x1 > x2,
    }[side.removesuffix(" of")]


def _answer(example: Example, scene: Scene) -> str:
    """Answer an example with no code of the tasks."""
    facts, subject = _facts(scene), example.subject
    if example.task == "existence":
        return "yes" if subject in [n for f in facts for n in (_named(f), f["is"])] else "no"
    if example.task.startswith("choice"):
        options = dict(option.split() for option in subject.split(" , "))
        present = {_called(f) for f in facts}
        assert len(options) == 3
        (right,) = [letter for letter, name in options.items() if GERMAN.get(name, name) in present]
        return right
    if example.task == "attributes":
        side, reference = re.fullmatch(r"(above|below|left of|right of) (the \w+)", subject).groups()
        (only,) = [f for f in facts if _lies(f, _meant(facts, reference), side)]
        return only["colour"]
    if example.task in ("word", "digit", "photo"):
        (only,) = [f["is"] for f in facts if f["kind"] == example.task]
        return only
    if example.task == "diagram":
        (end,) = [a.end for a in scene.arrows if divmod(a.start, 3) == _meant(facts, subject)["at"]]
        return next(_called(f) for f in facts if f["at"] == divmod(end, 3))
    if example.task == "count":
        return NUMBERS[len([f for f in facts if subject in ("things", f["kind"] + "s")])]
    if example.task == "relation":
        first, second = (_meant(facts, name) for name in subject.split(" seen from "))
        (side,) = [s for s in ("above", "below", "left", "right") if _lies(first, second, s)]
        return side
    if example.task == "size":
        (only,) = [_called(f) for f in facts if f["small"] == (subject == "smallest")]
        return only
    if example.task == "grounding":
        return _at(_meant(facts, subject))
    if example.task == "pairs":
        return _difference(subject, facts)
    assert example.task == "caption"
    return " , ".join(_named(f) for f in sorted(facts, key=lambda f: f["at"]))


def _difference(question: str, facts: list[dict]) -> str:
    for pattern, answer in (
        (r"what does the photo show", lambda: next(f["is"] for f in facts if f["kind"] == "photo")),
        (r"(?:what does the (word) say|which is the (digit))", lambda f: f["is"]),
        (r"what colour is the (\w+)", lambda f: f["colour"]),
        (r"where is the (\w+)", _at),
        (r"is the (\w+) small or big", lambda f: "small" if f["small"] else "big"),
    ):
        if match := re.fullmatch(pattern, question):
            return answer(*(_meant(facts, name) for name in match.groups() if name))
    raise AssertionError(question)


def test_every_answer_is_right() -> None:
    scenes = make_scenes("train", 300)
    examples = make_examples(scenes)
    assert {e.task for e in examples} == set(TASKS)
    for example in examples:
        assert example.answer == _answer(example, scenes[example.scene]), example
        assert example.subject in example.question


def test_the_tasks_are_those_of_the_papers_groups_and_the_conflict() -> None:
    groups = {group: [t.name for t in TASKS.values() if t.group == group] for group in tasks.GROUPS}
    assert groups == {
        "general": ["existence", "choice", "choice_german", "attributes"],
        "knowledge": ["word", "digit", "diagram"],
        "vision": ["pairs", "photo", "count", "relation", "size"],
        "conflict": ["grounding", "caption"],
    }
    assert {t.metric for t in TASKS.values()} <= set(tasks.METRICS)


def test_questions_do_not_depend_on_the_other_tasks() -> None:
    scenes = make_scenes("train", 21)
    alone = make_examples(scenes, ("grounding",))
    assert alone == [e for e in make_examples(scenes) if e.task == "grounding"]
    assert make_examples(scenes, seed=1) != make_examples(scenes)


def test_the_same_pictures_get_grounding_and_captioning_questions() -> None:
    examples = make_examples(make_scenes("train", 21))
    pictures = {task: {e.scene for e in examples if e.task == task} for task in ("grounding", "caption")}
    assert pictures["grounding"] == pictures["caption"] == set(range(21))


def test_the_german_questions_are_the_english_ones() -> None:
    examples = make_examples(make_scenes("train", 90), ("choice", "choice_german"))
    english, german = ([e for e in examples if e.task == task] for task in ("choice", "choice_german"))
    assert len(english) == len(german) > 50
    for one, other in zip(english, german, strict=True):
        translated = " ".join(GERMAN.get(word, word) for word in other.subject.split())
        assert (one.scene, one.subject, one.answer) == (other.scene, translated, other.answer)
        assert not set(one.question.split()) & set(other.question.split()) - {"?", ",", "A", "B", "C"}


def test_pairs_have_one_question_and_two_answers() -> None:
    scenes = make_scenes("train", 31)  # the last scene has no twin here
    examples = make_examples(scenes, ("pairs",))
    assert len(examples) == 20
    assert Counter(e.pair for e in examples) == dict.fromkeys(range(10), 2)
    for one, other in zip(examples[0::2], examples[1::2], strict=True):
        assert one.pair == other.pair
        assert one.scene + 1 == other.scene
        assert one.question == other.question
        assert one.answer != other.answer
    assert all(e.pair is None for e in make_examples(scenes) if e.task != "pairs")


def test_per_task_limits_each_task_and_counts_a_pair_once() -> None:
    counts = Counter(e.task for e in make_examples(make_scenes("train", 60), per_task=3))
    assert counts == {task: 6 if task == "pairs" else 3 for task in TASKS}


@pytest.fixture
def own_tasks():
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


def _ask_first(scene: Scene, rng: object) -> tuple[str, str]:
    return "first", scene.things[0].reference


def _task(**changes: object) -> Task:
    fields = {
        "name": "own", "group": "vision", "tests": "the top thing", "metric": "exact", "ask": _ask_first,
        "phrasings": ("what thing is top ?",),
    }  # fmt: skip
    return Task(**{**fields, **changes})


@pytest.mark.usefixtures("own_tasks")
def test_a_task_of_your_own_leaves_the_others_as_they_are() -> None:
    scenes = make_scenes("train", 9)
    before = make_examples(scenes)
    register(_task())
    after = make_examples(scenes)
    assert [e for e in after if e.task != "own"] == before
    assert [e.answer for e in after if e.task == "own"] == [scene.things[0].reference for scene in scenes]


@pytest.mark.usefixtures("own_tasks")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "photo"}, "photo"),
        ({"group": "art"}, "general | knowledge | vision | conflict"),
        ({"metric": "taste"}, "exact | letter | pairs | cider | iou"),
        ({"phrasings": ()}, "no phrasings"),
        ({"phrasings": ("which zebra ?",)}, "zebra"),
    ],
)
def test_a_task_that_cannot_work_is_refused(changes: dict, named: str) -> None:
    before = dict(TASKS)
    with pytest.raises(ConfigError, match=re.escape(named)):
        register(_task(**changes))
    assert before == TASKS


@pytest.mark.usefixtures("own_tasks")
def test_an_answer_with_unknown_words_is_refused_when_it_is_drawn() -> None:
    register(_task(ask=lambda scene, rng: ("first", "a zebra")))
    with pytest.raises(ConfigError, match="zebra"):
        make_examples(make_scenes("train", 3))


OWN = _task(name="entered")


@pytest.mark.usefixtures("own_tasks")
def test_entry_points_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry(EntryPoint):
        def load(self) -> Task:
            return OWN

    entry = Entry("entered", "somewhere:OWN", "covft.study_tasks")
    asked = []
    monkeypatch.setattr(tasks, "entry_points", lambda group: asked.append(group) or [entry])
    load_entry_points()
    load_entry_points()
    assert TASKS["entered"] is OWN
    assert set(asked) == {"covft.study_tasks"}
