"""Axes and colours of the figures: one file for light and dark pages.

Backgrounds are transparent. Ink has the same contrast, 4 to 1, with the white and the dark page of the docs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from study.results.contrasts import Estimate

INK = "#7b808c"
COLOURS = {"frozen": "#8a94a6", "full": "#3f8fd0", "covft": "#e0703a"}
OTHERS = ("#3f9f6f", "#a878c8", "#b8902a", "#4aa3a3", "#cf6a8e")
SETTINGS = {
    "svg.hashsalt": "covft",  # the same names of elements every time
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}


def panels(width: float, height: float, columns: int = 1, rows: int = 1, **more: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels in rows and columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **more).ravel())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG; the same figure gives the same bytes."""
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def colour(name: str, place: int = 0) -> str:
    """Return the colour of a method, or one of the others by its place."""
    return COLOURS.get(name) or OTHERS[place % len(OTHERS)]


def forest(axes: Axes, names: Sequence[str], found: Sequence[Estimate | None], colours: Sequence[str]) -> None:
    """Draw estimates with their intervals, one line each, from the top."""
    for place, (each, own) in enumerate(zip(found, colours, strict=True)):
        if each is not None:
            axes.plot([each.low, each.high], [place, place], color=own, lw=2, solid_capstyle="round")
            axes.plot(each.value, place, "o", color=own, ms=5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def curve(axes: Axes, xs: Sequence[float], found: Sequence[Estimate], label: str, own: str, shift: float = 0) -> None:
    """Draw estimates over a number, with their intervals.

    Args:
        axes: The panel; its x axis is logarithmic.
        xs: The numbers.
        found: The estimates.
        label: Name in the legend.
        own: Colour.
        shift: Moves the points aside, in hundredths of an octave, so that intervals do not cover each other.
    """
    moved = [x * math.exp2(shift / 100) for x in xs]
    ends = [[each.value - each.low for each in found], [each.high - each.value for each in found]]
    axes.errorbar(moved, [each.value for each in found], ends, fmt="o-", color=own, ms=4, lw=1.5, label=label)


def zero(axes: Axes, at: float = 0, *, vertical: bool = True) -> None:
    """Draw the line of no difference."""
    (axes.axvline if vertical else axes.axhline)(at, color=INK, lw=0.9, ls="--")
