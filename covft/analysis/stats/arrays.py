"""Checks arrays that come from a recording, or from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from covft.errors import ShapeError
from covft.utils.arguments import short


def rows_of(values: Any, name: str, least: int = 1) -> np.ndarray:
    """Return finite numbers, one row per sample, in float64.

    Args:
        values: An array or a tensor, shape `(N, ...)`; further axes are joined.
        name: Its name in messages.
        least: Least number of samples.

    Raises:
        ShapeError: If they are not.
    """
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"{name} are not numbers.", expected="an array (N, width)", got=short(values)) from error
    if numbers.ndim < 2 or len(numbers) < least or not numbers[0].size or not np.isfinite(numbers).all():
        raise ShapeError(
            f"{name} cannot be used.",
            expected=f"finite numbers, shape (N, width), N at least {least}",
            got=f"shape {numbers.shape}" if np.isfinite(numbers).all() else "numbers that are not finite",
        )
    return numbers.reshape(len(numbers), -1)


def codes_of(labels: Sequence[Any], rows: int) -> tuple[list[Any], np.ndarray]:
    """Return the distinct labels, in the order of their names, and the number of each sample's label.

    Args:
        labels: One per sample; samples without a label (None) get -1.
        rows: Number of samples.

    Raises:
        ShapeError: If there is another number of labels.
    """
    listed = labels.tolist() if hasattr(labels, "tolist") else list(labels)  # type: ignore[attr-defined]
    if len(listed) != rows:
        raise ShapeError("The labels are not as many as the samples.", expected=f"{rows} labels", got=len(listed))
    names = sorted({label for label in listed if label is not None}, key=lambda label: (str(type(label)), label))
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([place.get(label, -1) for label in listed], dtype=np.int64)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1; those of length 0 stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
