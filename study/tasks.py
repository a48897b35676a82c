"""Ten kinds of question about a scene, with their answers.

`caption` and `grounding` are the conflict in Fig. 1b of the CoVFT paper: what is there, and where it is, asked about
the same images. Answers are scored by exact match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from study.scenes import KINDS, PLACES, Scene, Thing
from study.tiles import COLOURS, DIGITS, PHOTOS, SHAPES, WORDS

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
    """

    task: str
    scene: int
    question: str
    answer: str
    subject: str


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


def _about(kind: str | None, answer: Callable[[Thing], str]) -> Callable:
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

# By task: the function that draws a subject and an answer, and the phrasings of the question. Tasks with many
# subjects have few phrasings, because the text encoder encodes every distinct question.
TASKS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "existence": (_existence, ("is there any {} ?", "can you see any {} ?")),
    "count": (_count, ("how many {} are there ?", "count the {} .", "what is the number of {} ?")),
    "colour": (
        _about("shape", lambda thing: str(thing.tile.colour)),
        ("what colour is {} ?", "which colour does {} have ?", "name the colour of {} ."),
    ),
    "grounding": (
        _about(None, lambda thing: thing.place),
        ("where is {} ?", "locate {} .", "in which place is {} ?"),
    ),
    "region": (
        _region,
        ("what is in the {} ?", "what do you see at the {} ?", "name the object in the {} ."),
    ),
    "relation": (_relation, ("is {} ?",)),
    "digit": (
        _about("digit", lambda thing: thing.tile.name),
        ("which is {} ?", "read {} .", "what number does {} show ?"),
    ),
    "word": (
        _about("word", lambda thing: thing.tile.name),
        ("what does {} say ?", "read {} .", "which letters are in {} ?"),
    ),
    "photo": (_only_photo, ("what does {} show ?", "what is in {} ?", "name the subject of {} .")),
    "caption": (_caption, ("describe {} .", "what does {} show ?", "write a caption for {} .")),
}


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
            drawn = TASKS[name][0](scene, rng)
            if drawn is None or left[name] == 0:
                continue
            left[name] -= 1
            subject, answer = drawn
            question = str(_pick(rng, list(TASKS[name][1]))).format(subject)
            found.append(Example(name, position, question, answer, subject))
    return found


def all_words() -> Iterator[str]:
    """Yield every word of the questions and answers, with repetitions."""
    for _, phrasings in TASKS.values():
        for phrasing in phrasings:
            yield from phrasing.replace("{}", " ").split()
    for names in NAMES.values():
        yield from " ".join(names).split()
    yield from " ".join(PLACES).split()
    yield from " ".join(SIDES).split()
    yield from DIGITS
    yield from COUNTED
    yield from "the photo picture shape digit word nothing yes no , blank".split()
