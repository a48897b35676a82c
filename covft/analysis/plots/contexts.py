"""Contexts as a scatter, with the samples near each centroid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from covft.analysis.plots.figures import COLOURS, MARKERS, bare, figure
from covft.analysis.stats.arrays import codes_of
from covft.analysis.stats.contexts import Clusters, Projection
from covft.errors import ShapeError
from covft.utils.arguments import check_kinds


@check_kinds
def plot_contexts(
    projection: Projection,
    labels: Sequence[Any] | None = None,
    *,
    clusters: Clusters | None = None,
    thumbnails: np.ndarray | None = None,
) -> Any:
    """Draw context vectors along their first two components.

    Args:
        projection: Of `project`, with two components or more.
        labels: Group of each sample, which gives its colour, such as `Recording.kinds`; None takes the clusters.
        clusters: Of `cluster`; with thumbnails, the samples nearest to each centroid are shown beside the scatter.
        thumbnails: Of `Recording.thumbnails`.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ShapeError: If the arguments are of different samples, or there is one component.
    """
    count, dims = projection.points.shape
    given = {"labels": labels, "clusters": clusters and clusters.labels, "thumbnails": thumbnails}
    sizes = {name: len(value) for name, value in given.items() if value is not None}
    if dims < 2 or any(size != count for size in sizes.values()):
        raise ShapeError(
            "These cannot be drawn together.",
            expected=f"two components, and as many labels, clusters and thumbnails as points: {count}",
            got=f"{dims} components, {sizes}",
        )
    if labels is None and clusters is not None:
        labels = [f"cluster {label}" for label in clusters.labels]
    names, codes = codes_of([None] * count if labels is None else labels, count)
    pictured = clusters is not None and thumbnails is not None
    drawn = figure(9.5 if pictured else 6, 5)
    axes, *beside = drawn.subplots(1, 2, width_ratios=[2, 1]) if pictured else [drawn.subplots()]
    for code in (-1, *range(len(names))):
        own = projection.points[codes == code]
        if len(own):
            style = {"color": "#999999"} if code < 0 else {"color": COLOURS[code % len(COLOURS)]}
            label = "no kind" if code < 0 and names else None if code < 0 else str(names[code])
            axes.scatter(*own[:, :2].T, s=14, alpha=0.7, marker=MARKERS[code % len(MARKERS)], label=label, **style)
    shares = 100 * projection.explained
    axes.set_xlabel(f"component 1 ({shares[0]:.0f} % of the variance)")
    axes.set_ylabel(f"component 2 ({shares[1]:.0f} %)")
    if names:
        axes.legend(fontsize=8)
    if clusters is not None:
        axes.set_title(f"{len(clusters.centroids)} clusters, silhouette {clusters.silhouette:.2f}", fontsize=10)
    if pictured:
        _near(beside[0], clusters, thumbnails)
    return drawn


def _near(axes: Any, clusters: Any, thumbnails: Any) -> None:
    """Draw the samples nearest to each centroid, one row per cluster."""
    columns, side = max(map(len, clusters.nearest)), thumbnails.shape[1]
    step = side + max(side // 10, 1)
    sheet = np.full((step * len(clusters.nearest), step * columns, 3), 255, dtype=np.uint8)
    for row, members in enumerate(clusters.nearest):
        for column, sample in enumerate(members):
            sheet[row * step : row * step + side, column * step : column * step + side] = thumbnails[sample]
    axes.imshow(sheet)
    bare(axes)
    names = [f"cluster {number}" for number in range(len(clusters.nearest))]
    axes.set_yticks([row * step + side / 2 for row in range(len(names))], names, fontsize=8)
    axes.set_title("nearest to the centroids", fontsize=10)
