"""What each task asks about a scene: functions that draw a subject and its answer.

A function returns None where the scene does not allow its question. Answers are balanced: how often an answer is
right depends little on the question, and on the task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np

from study.data.scenes import Scene, Thing
from study.data.tiles import DIGITS, PHOTOS, SHAPES, WORDS

Ask = Callable[[Scene, np.random.Generator], "tuple[str, str] | None"]
T = TypeVar("T")

SIDES = ("above", "below", "left of", "right of")
LETTERS = ("A", "B", "C")
COUNTED = ("things", "shapes", "photos")
# What existence asks for, by kind.
NAMES = {
    "shape": SHAPES,
    "digit": tuple(f"digit {digit}" for digit in DIGITS),
    "word": tuple(f"word {word}" for word in WORDS),
    "photo": PHOTOS,
}
# Three options of one kind: all trios of shapes; of photos few, because the text encoder encodes every question.
TRIOS = (
    *combinations(SHAPES, 3),
    *((PHOTOS[i], PHOTOS[(i + 1) % len(PHOTOS)], PHOTOS[(i + 3) % len(PHOTOS)]) for i in range(len(PHOTOS))),
)
GERMAN = {
    "circle": "kreis", "rectangle": "rechteck", "triangle": "dreieck", "star": "stern", "cross": "kreuz",
    "cat": "katze", "coffee": "kaffee", "rocket": "rakete", "coins": "münzen", "bricks": "ziegel", "grass": "gras",
    "stars": "sterne", "face": "gesicht",
}  # fmt: skip


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draw one of the options."""
    return options[int(rng.integers(len(options)))]


def the(thing: Thing) -> str:
    """Return what questions call a thing: `the circle`, `the digit`."""
    return f"the {thing.reference}"


def ask_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for a thing that is there, or for an absent one of a kind that is there."""
    present = {name: kind for kind, names in NAMES.items() for name in names if _has(scene, kind, name)}
    if rng.random() < 0.5:
        return pick(rng, list(present)), "yes"
    kind = present[pick(rng, list(present))]
    return pick(rng, [name for name in NAMES[kind] if name not in present]), "no"


def _has(scene: Scene, kind: str, name: str) -> bool:
    return any(thing.kind == kind and thing.tile.name == name.split()[-1] for thing in scene.things)


def ask_choice(names: dict[str, str] | None = None) -> Ask:
    """Ask which of three named things is there; two are not.

    Args:
        names: What to call the things; None for their own names.
    """

    def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
        present = {thing.reference for thing in scene.things}
        fitting = [trio for trio in TRIOS if len(present & set(trio)) == 1]
        if not fitting:
            return None
        options = [str(name) for name in rng.permutation(pick(rng, fitting))]
        right = next(i for i, name in enumerate(options) if name in present)
        said = [f"{letter} {(names or {}).get(name, name)}" for letter, name in zip(LETTERS, options, strict=True)]
        return " , ".join(said), LETTERS[right]

    return ask


def ask_attributes(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for the colour of the only thing on one side of another, in its row or column."""
    found = []
    for thing in scene.things:
        for side in SIDES:
            there = [other for other in scene.things if side_of(other, thing) == side]
            if len(there) == 1 and there[0].kind == "shape":
                found.append((f"{side} {the(thing)}", str(there[0].tile.colour)))
    return pick(rng, found) if found else None


def side_of(first: Thing, second: Thing) -> str | None:
    """Return on which side of `second`, in its row or column, `first` is; None elsewhere."""
    if first.row == second.row and first.column != second.column:
        return "left of" if first.column < second.column else "right of"
    if first.column == second.column and first.row != second.row:
        return "above" if first.row < second.row else "below"
    return None


def ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask on which side of a thing another one in its row or column is."""
    found = [(a, b) for a in scene.things for b in scene.things if side_of(a, b)]
    if not found:
        return None
    first, second = pick(rng, found)
    return f"{the(first)} seen from {the(second)}", str(side_of(first, second)).split()[0]


def ask_name(kind: str) -> Ask:
    """Ask what a digit or word says, or what the only photograph shows."""

    def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
        things = [thing for thing in scene.things if thing.kind == kind]
        return (f"the {kind}", things[0].tile.name) if len(things) == 1 else None

    return ask


def ask_diagram(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask where the arrow from a thing leads."""
    if not scene.arrows:
        return None
    arrow = pick(rng, scene.arrows)
    start, end = scene.at(arrow.start), scene.at(arrow.end)
    assert start is not None
    assert end is not None
    return the(start), end.reference


def ask_difference(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for what differs between twins; both get the same question."""
    change = scene.change
    if change is None:
        return None
    what, reference = change.what, change.reference
    if what == "photo":
        return "what does the photo show", next(t.tile.name for t in scene.things if t.kind == "photo")
    thing = scene.thing(reference)
    return {
        "colour": (f"what colour is the {reference}", str(thing.tile.colour)),
        "digit": ("which is the digit", thing.tile.name),
        "word": ("what does the word say", thing.tile.name),
        "place": (f"where is the {reference}", thing.place),
        "size": (f"is the {reference} small or big", thing.size),
    }[what]


def ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask how many things, shapes or photographs there are."""
    what = pick(rng, COUNTED)
    count = sum(what == "things" or f"{thing.kind}s" == what for thing in scene.things)
    return what, DIGITS[count]


def ask_size(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for the only small or the only big thing among others."""
    found = []
    for size, said in (("small", "smallest"), ("big", "biggest")):
        things = [thing for thing in scene.things if thing.size == size]
        if len(things) == 1 < len(scene.things):
            found.append((said, things[0].reference))
    return pick(rng, found) if found else None


def ask_grounding(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask where a thing is."""
    thing = pick(rng, scene.things)
    return the(thing), thing.place


def ask_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask for everything."""
    return "the picture", caption(scene)


def caption(scene: Scene) -> str:
    """Name everything in reading order: `red circle , digit seven , cat`."""
    return " , ".join(thing.name for thing in scene.things)
