"""Scenes: reproducible from their seed, with no sample in two splits; twins and diagrams."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from study.data.scenes import CELL, SIZE, SMALL, Arrow, Scene, as_batch, make_scenes
from study.data.tiles import SPLITS, TEXTURES, TILE, tiles


def test_scenes_depend_only_on_the_seed() -> None:
    first, again, other = (make_scenes("train", 12, seed) for seed in (3, 3, 4))
    assert [scene.things for scene in first] == [scene.things for scene in again]
    assert np.array_equal(as_batch(first), as_batch(again))
    assert not np.array_equal(as_batch(first), as_batch(other))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_longer_list_starts_with_the_shorter_one(count: int) -> None:
    assert make_scenes("test", count) == make_scenes("test", 9)[:count]


def test_no_sample_is_in_two_splits() -> None:
    sources = {split: {tile.source for kind in tiles(split).values() for tile in kind} for split in SPLITS}
    assert all(len(found) > 500 for found in sources.values())
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not sources[one] & sources[other]


def test_texture_crops_of_two_splits_share_no_column() -> None:
    def columns(split: str, file: str) -> set[int]:
        spans = [t.source.rsplit("/", 1)[1] for t in tiles(split)["photo"] if t.source.startswith(file)]
        return {x for span in spans for x in range(*map(int, span.split("-")))}

    for file in TEXTURES.values():
        seen = [columns(split, file) for split in SPLITS]
        assert all(seen)
        assert sum(map(len, seen)) == len(set.union(*seen))


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_kind_and_name(split: str) -> None:
    known = {kind: {(t.name, t.colour) for t in found} for kind, found in tiles(split).items()}
    assert {kind: len(found) for kind, found in known.items()} == {
        "shape": 40,
        "digit": 10,
        "word": 12,
        "photo": 8,
    }


def _drawn(tile: np.ndarray, small: bool) -> np.ndarray:
    """Draw a tile: a small one has the mean of each area of 1.5 x 1.5 pixels."""
    if not small:
        return tile
    fine = np.kron(tile.astype(float), np.ones((2, 2, 1)))
    areas = [[fine[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].mean((0, 1)) for x in range(12)] for y in range(12)]
    return np.floor(np.array(areas) + 0.5).astype(np.uint8)


def test_things_lie_in_their_cells_and_have_distinct_names() -> None:
    for scene in make_scenes("validation", 60):
        assert 1 <= len(scene.things) <= 4
        assert scene.pixels.shape == (SIZE, SIZE, 3)
        assert scene.pixels.dtype == np.uint8
        references = [thing.reference for thing in scene.things]
        cells = [thing.cell for thing in scene.things]
        assert len(set(references)) == len(references)
        assert cells == sorted(set(cells))
        for thing in scene.things:
            # the pixels are there, at most one pixel off the centre of the cell
            y, x = thing.cell // 3 * CELL, thing.cell % 3 * CELL
            cell = scene.pixels[y : y + CELL, x : x + CELL]
            side = SMALL if thing.small else TILE
            wanted, first = _drawn(thing.tile.pixels, thing.small), (CELL - side) // 2 - 1
            shifts = [(dy, dx) for dy in range(first, first + 3) for dx in range(first, first + 3)]
            windows = (cell[dy : dy + side, dx : dx + side] for dy, dx in shifts)
            assert any(np.array_equal(window, wanted) for window in windows)
            assert not (thing.small and thing.kind == "word")


def test_of_three_scenes_two_are_twins_and_one_is_a_diagram() -> None:
    scenes = make_scenes("train", 30)
    for number, scene in enumerate(scenes):
        assert scene.number == number
        assert bool(scene.arrows) == (number % 3 == 2)
        assert scene.pair == (None if scene.arrows else number // 3)
        assert (scene.change is None) == bool(scene.arrows)


def _state(scene: Scene) -> Counter:
    return Counter((t.kind, t.name, t.cell, t.small) for t in scene.things)


def test_twins_differ_in_what_they_say_and_nowhere_else() -> None:
    scenes = make_scenes("train", 240)
    seen = set()
    for one, other in zip(scenes[0::3], scenes[1::3], strict=True):
        assert one.change == other.change
        (before,), (after,) = (_state(one) - _state(other)), (_state(other) - _state(one))
        kind, name, cell, small = before
        if one.change.what == "place":
            assert (kind, name, small) == (after[0], after[1], after[3])
            assert cell != after[2]
        elif one.change.what == "size":
            assert (kind, name, cell) == after[:3]
            assert small != after[3]
        else:
            assert (kind, cell, small) == (after[0], after[2], after[3])
            assert name != after[1]
            assert kind == {"colour": "shape"}.get(one.change.what, one.change.what)
            assert kind != "shape" or name.split()[1] == after[1].split()[1]
        # outside the cells of the thing, the images agree
        outside = np.ones((SIZE, SIZE), bool)
        for y, x in (divmod(cell, 3), divmod(after[2], 3)):
            outside[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] = False
        assert np.array_equal(one.pixels[outside], other.pixels[outside])
        assert not np.array_equal(one.pixels, other.pixels)
        seen.add(one.change.what)
    assert seen == {"colour", "digit", "word", "photo", "place", "size"}


def test_arrows_lead_from_one_corner_to_the_next_and_are_drawn_there() -> None:
    directions = set()
    for scene in make_scenes("test", 60)[2::3]:
        starts = [arrow.start for arrow in scene.arrows]
        assert len(set(starts)) == len(starts) >= 1
        cells = {thing.cell for thing in scene.things}
        assert cells <= {0, 2, 6, 8}
        for arrow in scene.arrows:
            assert {arrow.start, arrow.end} <= cells
            (y, x), (y2, x2) = divmod(arrow.start, 3), divmod(arrow.end, 3)
            assert (y == y2) != (x == x2)
            # the shaft is dark halfway, and the head, next to the end, is wider than the tail
            middle = np.array([(y + y2) * CELL // 2 + CELL // 2, (x + x2) * CELL // 2 + CELL // 2])
            way = np.sign([y2 - y, x2 - x])
            assert (scene.pixels[tuple(middle)] == 40).all()
            widths = []
            for sign in (1, -1):
                row, column = middle + sign * 7 * way
                around = slice(row - 6, row + 6), column
                if y != y2:
                    around = row, slice(column - 6, column + 6)
                widths.append(int((scene.pixels[around] == 40).all(-1).sum()))
            assert widths[1] == 2
            assert widths[0] >= 6
            directions.add(arrow.direction)
    assert directions == {"leftward", "rightward", "upward", "downward"}


@pytest.mark.parametrize(
    ("start", "end", "direction"), [(0, 2, "rightward"), (8, 6, "leftward"), (0, 6, "downward"), (8, 2, "upward")]
)
def test_directions(start: int, end: int, direction: str) -> None:
    assert Arrow(start, end).direction == direction
