"""Overlap of boxes, against cells counted on a grid."""

import random

import pytest

from covft.errors import ArgumentError, ShapeError
from covft.metrics import iou


def cells(box):
    left, top, right, bottom = box
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def box_on_the_grid(draw):
    (left, right), (top, bottom) = (sorted(draw.sample(range(9), 2)) for _ in range(2))
    return left, top, right, bottom


def test_overlap_is_that_of_cells_on_a_grid():
    draw = random.Random(0)
    found = set()
    for _ in range(300):
        box, other = box_on_the_grid(draw), box_on_the_grid(draw)
        expected = len(cells(box) & cells(other)) / len(cells(box) | cells(other))
        assert iou(box, other) == iou(other, box) == pytest.approx(expected, abs=1e-12)
        found.add(round(expected, 1))
    assert len(found) > 6


def test_units_and_places_do_not_matter():
    box, other = (0.1, 0.2, 0.5, 0.6), (0.3, 0.2, 0.7, 0.6)
    assert iou(box, other) == pytest.approx(1 / 3)
    moved = [tuple(640 * value - 50 for value in corners) for corners in (box, other)]
    assert iou(*moved) == pytest.approx(1 / 3)


@pytest.mark.parametrize("box", [(2, 2, 2, 4), (4, 1, 2, 3), (4, 4, 2, 2)])
def test_a_box_without_area_overlaps_with_nothing(box):
    assert iou(box, box) == iou(box, (0, 0, 9, 9)) == iou((0, 0, 9, 9), box) == 0.0


def test_boxes_have_four_numbers():
    with pytest.raises(ShapeError, match="four"):
        iou((0, 0, 1), (0, 0, 1, 1))
    with pytest.raises(ArgumentError):
        iou((0, 0, 1, None), (0, 0, 1, 1))
