"""Scenes: reproducible from their seed, with no sample in two splits."""

from __future__ import annotations

import numpy as np
import pytest

from study.data.scenes import CELL, GRID, SIZE, as_batch, make_scenes
from study.data.tiles import SPLITS, TEXTURES, tiles


def test_scenes_depend_only_on_the_seed() -> None:
    first, again, other = (make_scenes("train", 12, seed) for seed in (3, 3, 4))
    assert [scene.things for scene in first] == [scene.things for scene in again]
    assert np.array_equal(as_batch(first), as_batch(again))
    assert not np.array_equal(as_batch(first), as_batch(other))


def test_a_longer_list_starts_with_the_shorter_one() -> None:
    assert [s.things for s in make_scenes("test", 4)] == [s.things for s in make_scenes("test", 9)][:4]


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


def test_things_lie_in_their_cells_and_have_distinct_names() -> None:
    for scene in make_scenes("validation", 40):
        assert 2 <= len(scene.things) <= 4
        assert scene.pixels.shape == (SIZE, SIZE, 3)
        assert scene.pixels.dtype == np.uint8
        references = [thing.reference for thing in scene.things]
        cells = [thing.cell for thing in scene.things]
        assert len(set(references)) == len(references)
        assert cells == sorted(set(cells))
        for thing in scene.things:
            # the tile's pixels are there, at most one pixel off the centre of the cell
            y, x = thing.row * CELL, thing.column * CELL
            cell = scene.pixels[y : y + CELL, x : x + CELL]
            side = thing.tile.pixels.shape[0]
            windows = (cell[dy : dy + side, dx : dx + side] for dy in range(3) for dx in range(3))
            assert any(np.array_equal(window, thing.tile.pixels) for window in windows)
            assert thing.cell < GRID * GRID
