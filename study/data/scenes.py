"""Seeded images of two to four things on a 3 x 3 grid, with their descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from study.data.tiles import SPLITS, TILE, Tile, tiles

GRID = 3
CELL = 20  # two patches of ten pixels
SIZE = GRID * CELL
KINDS = ("shape", "digit", "word", "photo")
PLACES = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)


@dataclass(frozen=True)
class Thing:
    """A thing in a scene: a tile and its cell (0 to 8, in reading order)."""

    tile: Tile
    cell: int

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


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the seed of their background."""

    number: int
    split: str
    things: tuple[Thing, ...]
    ground_seed: int

    @cached_property
    def pixels(self) -> np.ndarray:
        """The image, uint8, shape `(60, 60, 3)`."""
        rng = np.random.default_rng(self.ground_seed)
        coarse = rng.integers(-14, 15, (5, 5, 3)).repeat(SIZE // 5, 0).repeat(SIZE // 5, 1)
        ground = rng.integers(200, 236, 3) + coarse + rng.integers(-8, 9, (SIZE, SIZE, 3))
        image = np.clip(ground, 0, 255).astype(np.uint8)
        for thing in self.things:
            y, x = (thing.row * CELL + (CELL - TILE) // 2, thing.column * CELL + (CELL - TILE) // 2)
            dy, dx = rng.integers(-1, 2, 2)
            image[y + dy : y + dy + TILE, x + dx : x + dx + TILE] = thing.tile.pixels
        return image


def make_scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """Draw scenes; a longer list starts with the shorter one.

    No scene has two shapes of one form, two photographs of one subject, two digits or two words, so "the circle" and
    "the digit" are unambiguous.
    """
    pool = tiles(split)
    by_name = {kind: _group(pool[kind]) for kind in KINDS}
    return [_draw(split, number, seed, by_name) for number in range(count)]


def _group(found: tuple[Tile, ...]) -> dict[tuple[str, str | None], list[Tile]]:
    groups: dict[tuple[str, str | None], list[Tile]] = {}
    for tile in found:
        groups.setdefault((tile.name, tile.colour), []).append(tile)
    return groups


def _draw(split: str, number: int, seed: int, by_name: dict) -> Scene:
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    count = int(rng.integers(2, 5))
    chosen: list[Tile] = []
    taken: set[str] = set()
    while len(chosen) < count:
        kind = str(rng.choice(KINDS, p=(0.4, 0.2, 0.15, 0.25)))
        groups = by_name[kind]
        name = list(groups)[int(rng.integers(len(groups)))]
        slot = kind if kind in ("digit", "word") else name[0]
        if slot in taken:
            continue
        taken.add(slot)
        chosen.append(groups[name][int(rng.integers(len(groups[name])))])
    cells = sorted(rng.choice(GRID * GRID, count, replace=False).tolist())
    things = tuple(Thing(tile, cell) for tile, cell in zip(chosen, cells, strict=True))
    return Scene(number, split, things, int(rng.integers(2**31)))


def as_batch(scenes: list[Scene]) -> np.ndarray:
    """Return the images as a model takes them: float32 in [-1, 1], shape `(B, 3, 60, 60)`."""
    return np.stack([scene.pixels for scene in scenes]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
