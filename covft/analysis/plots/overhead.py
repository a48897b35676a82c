"""Costs as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covft.analysis.plots.figures import COLOURS, figure
from covft.analysis.stats.overhead import Cost
from covft.utils.arguments import check_kinds

_PANELS = (
    ("parameters (millions)", "parameters", 1e6),
    ("FLOPs of a forward (billions)", "flops", 1e9),
    ("time of a forward (ms)", "seconds", 1e-3),
    ("kept for backward (MB)", "kept_bytes", 1e6),
)


@check_kinds
def plot_overhead(costs: Sequence[Cost]) -> Any:
    """Draw parameters, FLOPs, time and memory, one bar per row.

    Args:
        costs: Of `overhead`.

    Returns:
        A matplotlib `Figure`.
    """
    drawn = figure(11, 1 + 0.45 * len(costs))
    panels = drawn.subplots(1, len(_PANELS), sharey=True)
    names = [cost.name for cost in costs]
    for axes, (title, field, unit) in zip(panels, _PANELS, strict=True):
        values = [getattr(cost, field) for cost in costs]
        bars = axes.barh(names, [(value or 0) / unit for value in values], color=COLOURS[0])
        axes.bar_label(
            bars, ["not counted" if value is None else f"{value / unit:.3g}" for value in values], fontsize=8
        )
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.3)
    panels[0].invert_yaxis()
    return drawn
