"""Overlap of boxes."""

from __future__ import annotations

from collections.abc import Sequence

from covft.errors import ShapeError
from covft.utils.arguments import check_kinds


@check_kinds
def iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection of two boxes over their union, from 0 to 1.

    A box without area, or with its corners in the wrong order, as a model may answer, overlaps with nothing: 0.

    Args:
        box: Corners `(left, top, right, bottom)`, in any unit.
        other: The same of the other box, in the same unit.

    Raises:
        ShapeError: If a box does not have four numbers.

    Example:
        >>> iou((0, 0, 2, 2), (1, 0, 3, 2))
        0.3333333333333333
    """
    for corners in (box, other):
        if len(corners) != 4:
            raise ShapeError("A box has four numbers.", expected="(left, top, right, bottom)", got=f"{len(corners)}")
    if _area(box) == 0 or _area(other) == 0:
        return 0.0
    shared = _area((max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3])))
    return float(shared / (_area(box) + _area(other) - shared))


def _area(box: Sequence[float]) -> float:
    left, top, right, bottom = box
    return max(right - left, 0) * max(bottom - top, 0)
