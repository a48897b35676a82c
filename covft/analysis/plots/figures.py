"""Makes figures without pyplot: nothing global changes, and no window opens."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from covft.utils.extras import import_library

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A6A00", "#555555")
"""Told apart with every colour vision (Okabe and Ito), on white and on dark grey; further groups repeat them."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figure(width: float, height: float) -> Any:
    """Make an empty figure.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    import_library("matplotlib", "analysis", needed_by="A figure")
    return importlib.import_module("matplotlib.figure").Figure((width, height), layout="constrained")


def heat(axes: Any, values: np.ndarray, rows: Sequence[Any], columns: Sequence[Any], **options: Any) -> Any:
    """Draw a table of numbers as colours, each with its number where there is room.

    Args:
        axes: Where to draw.
        values: Shape (rows, columns).
        rows: Labels of rows.
        columns: Labels of columns.
        **options: Of `imshow`, such as `vmin`.
    """
    image = axes.imshow(values, aspect="auto", cmap="cividis", **options)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    if values.size <= 120:
        low, high = image.get_clim()
        for (row, column), value in np.ndenumerate(values):
            dark = value < low + 0.55 * (high - low)
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if dark else "k", fontsize=7)
    return image


def bare(axes: Any) -> None:
    """Take ticks and frame off."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
