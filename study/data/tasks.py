"""Ten kinds of question about a scene, with their answers.

`caption` and `grounding` are the conflict in Fig. 1b of the CoVFT paper: what is there, and where it is, asked about
the same images. Answers are scored by exact match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from study.data.scenes import KINDS, PLACES, Scene, Thing
from study.data.tiles import COLOURS, DIGITS, PHOTOS, SHAPES, WORDS

COUNTED = {"objects": KINDS, "shapes": ("shape",), "photos": ("photo",)}
SIDES = ("above", "below", "left of", "right of")


@dataclass(frozen=True)
class Example:
    """One question about one scene.

    Attributes:
        task: Name of the task.
        scene: Index of the scene in its list.
        question: The question.
        answer: The answer.
        subject: What the question is about (a name, a place, a pair).
        pair: Number that two questions share which are scored together; None for the others.
    """

    task: str
    scene: int
    question: str
    answer: str
    subject: str
    pair: int | None = None


Ask = Callable[[Scene, np.random.Generator], "tuple[str, str] | None"]


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        name: Its name.
        group: `general`, `knowledge`, `vision`, or `conflict`, which is reported apart.
        tests: What it tests, and the benchmark of the paper that it stands for.
        metric: How answers are scored: `exact`, `letter`, `pairs`, `cider` or `iou`.
        ask: Draws a subject and the answer for a scene; None where the scene does not allow the question.
        phrasings: The question, with `{}` for the subject.
    """

    name: str
    group: str
    tests: str
    metric: str
    ask: Ask
    phrasings: tuple[str, ...]


def _pick(rng: np.random.Generator, options: list) -> object:
    return options[int(rng.integers(len(options)))]


def _the(thing: Thing) -> str:
    return f"the {thing.reference}"


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    present = {thing.name for thing in scene.things}
    if rng.random() < 0.5:
        return str(_pick(rng, sorted(present))), "yes"
    kind = str(_pick(rng, sorted({thing.kind for thing in scene.things})))
    # of a kind that is present, so that the kind alone does not answer the question
    absent = [name for name in NAMES[kind] if name not in present]
    return str(_pick(rng, absent)), "no"


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    what = str(_pick(rng, list(COUNTED)))
    return what, DIGITS[sum(thing.kind in COUNTED[what] for thing in scene.things)]


def _about(kind: str | None, answer: Callable[[Thing], str]) -> Ask:
    def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
        things = [thing for thing in scene.things if kind in (None, thing.kind)]
        if not things:
            return None
        thing = _pick(rng, things)
        assert isinstance(thing, Thing)
        return _the(thing), answer(thing)

    return ask


def _only_photo(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    photos = [thing for thing in scene.things if thing.kind == "photo"]
    return ("the photo", photos[0].name) if len(photos) == 1 else None


def _region(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    found = {thing.place: thing.name for thing in scene.things}
    if rng.random() < 0.85:
        place = str(_pick(rng, sorted(found)))
        return place, found[place]
    return str(_pick(rng, [place for place in PLACES if place not in found])), "nothing"


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    first, second = (scene.things[i] for i in rng.choice(len(scene.things), 2, replace=False))
    sides = [side for side in SIDES if holds(side, first, second) or holds(side, second, first)]
    side = str(_pick(rng, sides))
    return f"{_the(first)} {side} {_the(second)}", "yes" if holds(side, first, second) else "no"


def holds(side: str, first: Thing, second: Thing) -> bool:
    """Return whether `first` is above, below, left of or right of `second`."""
    return {
        "above": first.row < second.row,
        "below": first.row > second.row,
        "left of": first.column < second.column,
        "right of": first.column > second.column,
    }[side]


def _caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    return "the picture", caption(scene)


def caption(scene: Scene) -> str:
    """Name everything in reading order: `red circle , digit seven , cat`."""
    return " , ".join(thing.name for thing in scene.things)


NAMES = {
    "shape": [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS],
    "digit": [f"digit {digit}" for digit in DIGITS],
    "word": [f"word {word}" for word in WORDS],
    "photo": list(PHOTOS),
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        # Tasks with many subjects have few phrasings, because the text encoder encodes every distinct question.
        Task(
            "existence", "general", "whether a named thing is there (POPE)", "exact",
            _existence, ("is there any {} ?", "can you see any {} ?"),
        ),
        Task(
            "count", "vision", "how many there are (CV-Bench)", "exact",
            _count, ("how many {} are there ?", "count the {} .", "what is the number of {} ?"),
        ),
        Task(
            "colour", "general", "the colour of a named shape (GQA)", "exact",
            _about("shape", lambda thing: str(thing.tile.colour)),
            ("what colour is {} ?", "which colour does {} have ?", "name the colour of {} ."),
        ),
        Task(
            "grounding", "conflict", "where a named thing is (RefCOCO)", "exact",
            _about(None, lambda thing: thing.place),
            ("where is {} ?", "locate {} .", "in which place is {} ?"),
        ),
        Task(
            "region", "vision", "what is at a named place", "exact",
            _region, ("what is in the {} ?", "what do you see at the {} ?", "name the object in the {} ."),
        ),
        Task(
            "relation", "vision", "how two things lie (CV-Bench)", "exact",
            _relation, ("is {} ?",),
        ),
        Task(
            "digit", "knowledge", "reading a handwritten digit (OCRBench)", "exact",
            _about("digit", lambda thing: thing.tile.name),
            ("which is {} ?", "read {} .", "what number does {} show ?"),
        ),
        Task(
            "word", "knowledge", "reading a word (TextVQA)", "exact",
            _about("word", lambda thing: thing.tile.name),
            ("what does {} say ?", "read {} .", "which letters are in {} ?"),
        ),
        Task(
            "photo", "vision", "what the only photograph shows (RealWorldQA)", "exact",
            _only_photo, ("what does {} show ?", "what is in {} ?", "name the subject of {} ."),
        ),
        Task(
            "caption", "conflict", "everything in reading order (COCO captions)", "exact",
            _caption, ("describe {} .", "what does {} show ?", "write a caption for {} ."),
        ),
    )
}  # fmt: skip


def make_examples(
    scenes: list[Scene], tasks: tuple[str, ...] | None = None, per_task: int | None = None, seed: int = 0
) -> list[Example]:
    """Ask one question per scene and task, where the scene allows it.

    Args:
        scenes: The scenes; `Example.scene` is an index into this list.
        tasks: Names of the tasks; None is all.
        per_task: Maximum number of questions per task.
        seed: Seed of the questions.
    """
    names = tuple(TASKS) if tasks is None else tasks
    left = {name: len(scenes) if per_task is None else per_task for name in names}
    found: list[Example] = []
    for position, scene in enumerate(scenes):
        for name in names:
            # seeded by task, so that leaving one out does not change the others
            rng = np.random.default_rng([seed, scene.number, list(TASKS).index(name)])
            drawn = TASKS[name].ask(scene, rng)
            if drawn is None or left[name] == 0:
                continue
            left[name] -= 1
            subject, answer = drawn
            question = str(_pick(rng, list(TASKS[name].phrasings))).format(subject)
            found.append(Example(name, position, question, answer, subject))
    return found


def all_words() -> Iterator[str]:
    """Yield every word of the questions and answers, with repetitions."""
    for task in TASKS.values():
        for phrasing in task.phrasings:
            yield from phrasing.replace("{}", " ").split()
    for names in NAMES.values():
        yield from " ".join(names).split()
    yield from " ".join(PLACES).split()
    yield from " ".join(SIDES).split()
    yield from DIGITS
    yield from COUNTED
    yield from "the photo picture shape digit word nothing yes no , blank".split()
