"""Maps drawn over images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from covft.analysis.plots.figures import bare, figure
from covft.analysis.stats.attention import AttentionMaps, QuestionMaps
from covft.errors import LayerIndexError
from covft.utils.arguments import check_kinds


@check_kinds
def plot_attention(found: AttentionMaps, layers: Iterable[int] | None = None) -> Any:
    """Draw the attention of the context over each image: bright where it looks, each map from 0 to its largest value.

    Args:
        found: Of `attention_maps`.
        layers: Layers to draw; None draws up to four, spread over all.

    Returns:
        A matplotlib `Figure`, one row per image.

    Raises:
        LayerIndexError: If a layer has no map.
    """
    chosen = _chosen(sorted(found.maps), layers)
    rows = len(found.pictures)
    drawn = figure(2 * (len(chosen) + 1), 2.2 * rows)
    for row, all_axes in enumerate(drawn.subplots(rows, len(chosen) + 1, squeeze=False)):
        all_axes[0].imshow(found.pictures[row])
        all_axes[0].set_title(_short(found.texts[row] or "image"), fontsize=7)
        bare(all_axes[0])
        for axes, layer in zip(all_axes[1:], chosen, strict=True):
            _over(axes, found.pictures[row], found.maps[layer][row])
            axes.set_title(f"layer {layer}", fontsize=8)
    return drawn


@check_kinds
def plot_questions(found: QuestionMaps, layers: Iterable[int] | None = None) -> Any:
    """Draw where the features of an image move between two questions, on one scale for all layers.

    Args:
        found: Of `compare_questions`.
        layers: Blocks to draw; None draws up to four of those where something moves.

    Returns:
        A matplotlib `Figure`; with attention, a second and third row show where the context looks for each question.

    Raises:
        LayerIndexError: If a block has no map.
    """
    moving = [layer for layer in sorted(found.moved) if found.moved[layer].any()]
    chosen = _chosen(moving or sorted(found.moved), layers, sorted(found.moved))
    rows = 3 if found.attention else 1
    drawn = figure(2 * (len(chosen) + 1) + 0.8, 2.3 * rows)
    grid = drawn.subplots(rows, len(chosen) + 1, squeeze=False)
    top = max(float(found.moved[layer].max()) for layer in chosen) or 1.0
    titles = ["features that move", *found.texts]
    for row, all_axes in enumerate(grid):
        all_axes[0].imshow(found.picture)
        all_axes[0].set_title(_short(titles[row]), fontsize=7)
        for axes in all_axes:
            bare(axes)
    image = None
    for axes, layer in zip(grid[0][1:], chosen, strict=True):
        image = _over(axes, found.picture, found.moved[layer], top)
        axes.set_title(f"after block {layer}", fontsize=8)
    drawn.colorbar(image, ax=grid[0].tolist(), label="relative distance", shrink=0.8)
    for row in range(1, rows):
        for axes, layer in zip(grid[row][1:], chosen, strict=True):
            if layer in found.attention:
                _over(axes, found.picture, found.attention[layer][row - 1])
                axes.set_title(f"attention, layer {layer}", fontsize=8)
    return drawn


def _chosen(known: list[int], layers: Iterable[int] | None, drawable: list[int] | None = None) -> list[int]:
    if layers is None:
        places = np.linspace(0, len(known) - 1, min(4, len(known))).round().astype(int)
        return [known[place] for place in places]
    chosen, known = list(layers), drawable or known
    if not chosen or not set(chosen) <= set(known):
        raise LayerIndexError(f"layers={chosen} cannot be drawn.", expected=f"some of {known}", got=f"{chosen}")
    return chosen


def _over(axes: Any, picture: np.ndarray, values: np.ndarray, top: float | None = None) -> Any:
    """Draw a map over a picture in grey; black bars around the picture are left out of the map."""
    side, (rows, columns) = len(picture), values.shape
    height, width = side * min(1, rows / columns), side * min(1, columns / rows)
    left, upper = (side - width) / 2 - 0.5, (side - height) / 2 - 0.5
    axes.imshow(picture.mean(axis=-1), cmap="gray", vmin=0, vmax=255)
    extent = (left, left + width, upper + height, upper)
    image = axes.imshow(values, extent=extent, cmap="inferno", alpha=0.65, vmin=0, vmax=top or float(values.max()) or 1)
    axes.set_xlim(-0.5, side - 0.5)
    axes.set_ylim(side - 0.5, -0.5)
    bare(axes)
    return image


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
