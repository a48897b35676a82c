"""Seeded images of one to four things on a 3 x 3 grid, with their descriptions.

Of three scenes in a row, the first two are twins, which differ in one thing, and the third is a diagram: small things
in the corners, framed, with arrows between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from study.data.tiles import SPLITS, Tile, tiles

GRID = 3
CELL = 20  # two patches of ten pixels
SIZE = GRID * CELL
SMALL = 12  # pixels of a small thing; a big one has those of its tile
KINDS = ("shape", "digit", "word", "photo")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")  # no word names both a row and a column
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
CORNERS = (0, 2, 6, 8)
EDGES = ((0, 2), (6, 8), (0, 6), (2, 8))  # of the square of corners


@dataclass(frozen=True)
class Thing:
    """A thing in a scene: a tile, its cell (0 to 8, in reading order) and whether it is drawn small."""

    tile: Tile
    cell: int
    small: bool = False

    @property
    def kind(self) -> str:
        """`shape`, `digit`, `word` or `photo`."""
        return self.tile.kind

    @property
    def row(self) -> int:
        """Row of the cell, from 0 at the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """Column of the cell, from 0 at the left."""
        return self.cell % GRID

    @property
    def place(self) -> str:
        """Name of the cell."""
        return PLACES[self.cell]

    @property
    def size(self) -> str:
        """`small` or `big`."""
        return "small" if self.small else "big"

    @property
    def reference(self) -> str:
        """What questions call it without giving the answer away: `circle`, `digit`, `word`, `cat`."""
        return self.tile.name if self.kind in ("shape", "photo") else self.kind

    @property
    def words(self) -> tuple[str, ...]:
        """Words of its name: `("red", "circle")`, `("digit", "seven")`, `("cat",)`."""
        if self.kind == "shape":
            return (str(self.tile.colour), self.tile.name)
        return (self.tile.name,) if self.kind == "photo" else (self.kind, self.tile.name)

    @property
    def name(self) -> str:
        """Full name: `red circle`, `digit seven`, `cat`."""
        return " ".join(self.words)

    @property
    def pixels(self) -> np.ndarray:
        """The tile as it is drawn, uint8, shape `(18, 18, 3)` or `(12, 12, 3)`."""
        if not self.small:
            return self.tile.pixels
        # means over areas of 1.5 x 1.5 pixels, in integers, so that they are the same everywhere
        fine = self.tile.pixels.astype(np.int64).repeat(2, 0).repeat(2, 1)
        areas = fine.reshape(SMALL, 3, SMALL, 3, 3).sum((1, 3))
        return ((areas + 4) // 9).astype(np.uint8)


@dataclass(frozen=True)
class Arrow:
    """An arrow of a diagram, between the things of two cells in one row or one column."""

    start: int
    end: int

    @property
    def direction(self) -> str:
        """`leftward`, `rightward`, `upward` or `downward`."""
        if self.start // GRID == self.end // GRID:
            return "rightward" if self.end > self.start else "leftward"
        return "downward" if self.end > self.start else "upward"


@dataclass(frozen=True)
class Change:
    """The one difference between twins.

    Attributes:
        what: `colour`, `digit`, `word`, `photo`, `place` or `size`.
        reference: What questions call the thing that differs.
    """

    what: str
    reference: str


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the seed of their background.

    Attributes:
        number: Its position in the list that it was drawn in.
        split: Its split.
        things: The things.
        ground_seed: Seed of the background, and of the last pixel of the things' positions.
        arrows: Arrows; a scene with arrows is a diagram.
        pair: Number that it shares with its twin; None without a twin.
        change: How it differs from its twin.
    """

    number: int
    split: str
    things: tuple[Thing, ...]
    ground_seed: int
    arrows: tuple[Arrow, ...] = ()
    pair: int | None = None
    change: Change | None = None

    def thing(self, reference: str) -> Thing:
        """Return the thing that questions call so."""
        return next(thing for thing in self.things if thing.reference == reference)

    def at(self, cell: int) -> Thing | None:
        """Return the thing in a cell."""
        return next((thing for thing in self.things if thing.cell == cell), None)

    @cached_property
    def pixels(self) -> np.ndarray:
        """The image, uint8, shape `(60, 60, 3)`."""
        rng = np.random.default_rng(self.ground_seed)
        coarse = rng.integers(-14, 15, (5, 5, 3)).repeat(SIZE // 5, 0).repeat(SIZE // 5, 1)
        ground = rng.integers(200, 236, 3) + coarse + rng.integers(-8, 9, (SIZE, SIZE, 3))
        image = np.clip(ground, 0, 255).astype(np.uint8)
        shifts = rng.integers(-1, 2, (GRID * GRID, 2))  # by cell, so that twins agree in all other things
        for thing in self.things:
            pixels = thing.pixels
            side = len(pixels)
            y, x = np.array([thing.row, thing.column]) * CELL + (CELL - side) // 2 + shifts[thing.cell]
            if self.arrows:
                image[y - 1 : y + side + 1, x - 1 : x + side + 1] = 60  # the frame
            image[y : y + side, x : x + side] = pixels
        for arrow in self.arrows:
            _draw_arrow(image, arrow)
        return image


def _draw_arrow(image: np.ndarray, arrow: Arrow) -> None:
    """Draw a shaft of two pixels and a head of five, between the frames of two things."""
    lines = image if arrow.start // GRID == arrow.end // GRID else image.transpose(1, 0, 2)
    start, end = ((cell % GRID, cell // GRID) for cell in (arrow.start, arrow.end))
    along, across = (0, 1) if start[1] == end[1] else (1, 0)
    middle = start[across] * CELL + CELL // 2
    first, last = sorted((start[along], end[along]))
    low, high = first * CELL + 19, last * CELL
    lines[middle - 1 : middle + 1, low:high] = 40
    for step in range(5):
        at = high - 1 - step if end[along] == last else low + step
        lines[middle - 1 - step : middle + 1 + step, at] = 40


def make_scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """Draw scenes; a longer list starts with the shorter one.

    No scene has two shapes of one form, two photographs of one subject, two digits or two words, so "the circle" and
    "the digit" are unambiguous.
    """
    pool = tiles(split)
    groups = {kind: _group(pool[kind]) for kind in KINDS}
    found: list[Scene] = []
    for first in range(0, count, 3):
        rng = np.random.default_rng([seed, SPLITS.index(split), first])
        found += [*_draw_twins(split, first, rng, groups), _draw_diagram(split, first + 2, rng, groups)]
    return found[:count]


Groups = dict[str, dict[tuple[str, "str | None"], list[Tile]]]


def _group(found: tuple[Tile, ...]) -> dict[tuple[str, str | None], list[Tile]]:
    groups: dict[tuple[str, str | None], list[Tile]] = {}
    for tile in found:
        groups.setdefault((tile.name, tile.colour), []).append(tile)
    return groups


def _slot(tile: Tile) -> str:
    """Return what a scene may have once."""
    return tile.kind if tile.kind in ("digit", "word") else tile.name


def _draw_tiles(count: int, odds: tuple[float, ...], rng: np.random.Generator, groups: Groups) -> list[Tile]:
    chosen: list[Tile] = []
    while len(chosen) < count:
        kind = str(rng.choice(KINDS, p=odds))
        tile = _draw_tile(kind, rng, groups, lambda tile: True)
        if _slot(tile) not in map(_slot, chosen):
            chosen.append(tile)
    return chosen


def _draw_tile(kind: str, rng: np.random.Generator, groups: Groups, fits: Callable[[Tile], bool]) -> Tile:
    """Draw a name first and then one of its tiles, of those that fit."""
    found = [pool for pool in groups[kind].values() if fits(pool[0])]
    pool = found[int(rng.integers(len(found)))]
    return pool[int(rng.integers(len(pool)))]


def _draw_twins(split: str, number: int, rng: np.random.Generator, groups: Groups) -> list[Scene]:
    count = int(rng.integers(1, 5))
    chosen = _draw_tiles(count, (0.38, 0.18, 0.18, 0.26), rng, groups)
    cells = sorted(rng.choice(GRID * GRID, count, replace=False).tolist())
    # a word of twelve pixels cannot be read
    small = [bool(rng.random() < 0.5) and tile.kind != "word" for tile in chosen]
    things = tuple(Thing(*parts) for parts in zip(chosen, cells, small, strict=True))
    first = Scene(number, split, things, int(rng.integers(2**31)), pair=number // 3)
    thing = things[int(rng.integers(count))]
    options = ["place"] if thing.kind == "word" else ["place", "size"]
    if thing.kind != "photo" or sum(t.kind == "photo" for t in things) == 1:
        own = "colour" if thing.kind == "shape" else thing.kind
        options += [own, own]  # half of the changes are of what the thing is
    what = options[int(rng.integers(len(options)))]
    change = Change(what, "photo" if what == "photo" else thing.reference)
    other = _changed(thing, what, first, rng, groups)
    twins = sorted((other if t is thing else t for t in things), key=lambda t: t.cell)
    return [replace(first, change=change), replace(first, number=number + 1, things=tuple(twins), change=change)]


def _changed(thing: Thing, what: str, scene: Scene, rng: np.random.Generator, groups: Groups) -> Thing:
    if what == "size":
        return replace(thing, small=not thing.small)
    if what == "place":
        # the nearest free cells
        free = [cell for cell in range(GRID * GRID) if scene.at(cell) is None]
        far = [abs(cell // GRID - thing.row) + abs(cell % GRID - thing.column) for cell in free]
        near = [cell for cell, steps in zip(free, far, strict=True) if steps == min(far)]
        return replace(thing, cell=near[int(rng.integers(len(near)))])
    if what == "colour":
        tile = _draw_tile(
            "shape", rng, groups, lambda tile: tile.name == thing.tile.name and tile.colour != thing.tile.colour
        )
    else:
        tile = _draw_tile(thing.kind, rng, groups, lambda tile: tile.name != thing.tile.name)
    return replace(thing, tile=tile)


def _draw_diagram(split: str, number: int, rng: np.random.Generator, groups: Groups) -> Scene:
    count = int(rng.integers(3, 5))
    chosen = _draw_tiles(count, (0.45, 0.2, 0.0, 0.35), rng, groups)
    cells = sorted(rng.choice(CORNERS, count, replace=False).tolist())
    edges = [edge for edge in EDGES if set(edge) <= set(cells)]
    rng.shuffle(edges)
    arrows: list[Arrow] = []
    for a, b in edges[: count - 1]:
        arrow = Arrow(int(a), int(b)) if rng.random() < 0.5 else Arrow(int(b), int(a))
        if arrow.start not in [other.start for other in arrows]:  # "the arrow from" is unambiguous
            arrows.append(arrow)
    things = tuple(Thing(tile, cell, small=True) for tile, cell in zip(chosen, cells, strict=True))
    return Scene(number, split, things, int(rng.integers(2**31)), tuple(arrows))


def as_batch(scenes: list[Scene]) -> np.ndarray:
    """Return the images as a model takes them: float32 in [-1, 1], shape `(B, 3, 60, 60)`."""
    return np.stack([scene.pixels for scene in scenes]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
