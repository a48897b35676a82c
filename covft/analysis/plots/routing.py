"""Routing weights per layer, kind and expert, and routing against context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from covft.analysis.plots.figures import COLOURS, MARKERS, figure, heat
from covft.analysis.stats.routing import Correlation, LayerRouting, pair_similarities
from covft.errors import ConfigError
from covft.utils.arguments import check_kinds


@check_kinds
def plot_routing(routing: Mapping[int, LayerRouting]) -> Any:
    """Draw the mean weight of each expert, by layer and by kind, and how sure the router is.

    Args:
        routing: Of `summarise`.

    Returns:
        A matplotlib `Figure`.
    """
    if not routing:
        raise ConfigError("routing={} has no layer to draw.", expected="at least one layer", got="none")
    layers = sorted(routing)
    kinds, experts = routing[layers[0]].kinds, len(routing[layers[0]].load)
    tables = {"all samples": np.stack([routing[layer].load for layer in layers])}
    tables |= {kind: np.stack([routing[layer].by_kind[i] for layer in layers]) for i, kind in enumerate(kinds)}
    drawn = figure(1.2 + 2.1 * len(tables) + 3, 1.6 + 0.28 * len(layers))
    *grids, lines = drawn.subplots(1, len(tables) + 1, width_ratios=[1] * len(tables) + [1.4])
    top = max(table.max() for table in tables.values())
    for axes, (name, table) in zip(grids, tables.items(), strict=True):
        image = heat(axes, table, layers if axes is grids[0] else [""] * len(layers), range(experts), vmin=0, vmax=top)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("expert")
    grids[0].set_ylabel("layer")
    drawn.colorbar(image, ax=grids, label="mean routing weight", shrink=0.8)
    lines.plot(layers, [routing[layer].entropy for layer in layers], color="k", label="all samples")
    for i, kind in enumerate(kinds):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        lines.plot(layers, [routing[layer].entropy_by_kind[i] for layer in layers], label=kind, ms=4, **style)
    lines.axhline(np.log(experts), color="#888888", ls="--", lw=1, label="equal weights")
    lines.set_ylim(bottom=0)
    lines.set_xlabel("layer")
    lines.set_ylabel("entropy (nats)")
    lines.legend(fontsize=7)
    return drawn


@check_kinds
def plot_correlation(contexts: Any, weights: Mapping[int, Any], found: Correlation | None = None) -> Any:
    """Draw how alike two samples are routed against how alike their contexts are, as Fig. 3b of the paper.

    Args:
        contexts: As for `correlate`.
        weights: As for `correlate`.
        found: Its result, for the title.

    Returns:
        A matplotlib `Figure`.
    """
    x, y = pair_similarities(contexts, weights)
    drawn = figure(5, 4)
    axes = drawn.subplots()
    bins = axes.hexbin(x, y, gridsize=40, cmap="cividis", bins="log", mincnt=1)
    drawn.colorbar(bins, ax=axes, label="pairs of samples")
    axes.set_xlabel("similarity of contexts (cosine)")
    axes.set_ylabel("similarity of routing (cosine)")
    if found is not None:
        axes.set_title(f"r = {found}", fontsize=10)
    return drawn
