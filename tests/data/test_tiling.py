"""Dynamic tiling against every grid tried in turn, and the pictures that come out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from covft.data import DynamicTiling, NoTiling, PadToSquare, pad_to_square, tile_grid, tile_image
from covft.errors import ConfigError
from tests.helpers.data import photograph


def by_trying(width, height, low, high, size):
    """The description, step by step: nearest ratio; among equals the largest grid that is more than half filled."""
    best, distance = None, float("inf")
    for tiles in range(low, high + 1):
        for columns in range(1, tiles + 1):
            if tiles % columns:
                continue
            rows = tiles // columns
            far = abs(width / height - columns / rows)
            if far < distance:
                best, distance = (columns, rows), far
            elif far == distance and 2 * width * height > size * size * tiles:
                best = (columns, rows)
    return best


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 6), st.integers(0, 12), st.sampled_from([32, 448]))
def test_grid(width, height, low, more, size):
    grid = tile_grid(width, height, min_tiles=low, max_tiles=low + more, tile_size=size)
    assert low <= grid[0] * grid[1] <= low + more
    assert grid == by_trying(width, height, low, low + more, size)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),  # fills half of 2 x 2 less than half
        ((800, 800), (2, 2)),
        ((2000, 2000), (3, 3)),
        ((900, 300), (3, 1)),
        ((300, 900), (1, 3)),
        ((800, 600), (4, 3)),
        ((10, 4000), (1, 12)),
    ],
)
def test_grids_known_by_hand(size, grid):
    assert tile_grid(*size) == grid


@pytest.mark.parametrize(("low", "high"), [(0, 3), (4, 3)])
def test_limits_that_cannot_work(low, high):
    with pytest.raises(ConfigError, match="allow no grid"):
        tile_grid(10, 10, min_tiles=low, max_tiles=high)


def test_tiles_put_together_are_the_resized_picture():
    image = photograph("coffee")  # 600 x 400
    tiles = tile_image(image, max_tiles=6, tile_size=40)
    assert [tile.size for tile in tiles] == [(40, 40)] * 7
    rows = [np.concatenate([np.array(tile) for tile in tiles[start : start + 3]], axis=1) for start in (0, 3)]
    assert np.array_equal(np.concatenate(rows), np.array(image.resize((120, 80))))
    assert np.array_equal(tiles[-1], image.resize((40, 40)))


def test_thumbnails_only_beside_several_tiles():
    square = photograph("chelsea").resize((40, 40))
    assert len(tile_image(square, tile_size=40)) == 1
    assert len(tile_image(photograph("coffee"), max_tiles=6, tile_size=40, thumbnail=False)) == 6


def test_cuts():
    image = photograph("coffee")
    assert NoTiling()(image) == [image]
    assert len(DynamicTiling(max_tiles=6, tile_size=40)(image)) == 7
    assert len(DynamicTiling(max_tiles=6, tile_size=40)(image, 2)) == 3
    assert len(DynamicTiling(min_tiles=4, max_tiles=6, tile_size=40)(image, 1)) == 1
    assert [picture.size for picture in PadToSquare()(image)] == [(600, 600)]


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (5, 5)])
def test_padding(size):
    image = Image.new("RGB", size, (200, 0, 0))
    square = np.array(pad_to_square(image, (1, 2, 3)))
    side = max(size)
    assert square.shape == (side, side, 3)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    inner = square[top : top + size[1], left : left + size[0]]
    assert (inner == (200, 0, 0)).all()
    assert (square == (1, 2, 3)).all(-1).sum() == side * side - size[0] * size[1]


def test_the_border_is_clips_mean():
    assert PadToSquare().color == tuple(int(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073))
