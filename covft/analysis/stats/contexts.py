"""Context vectors: principal components, clusters, and how alike samples are within and between them.

Shapes: N samples, W width of a vector, C clusters, M samples near a centroid.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covft.analysis.stats.arrays import codes_of, rows_of, unit_rows
from covft.errors import ConfigError
from covft.utils.arguments import check_kinds, check_sizes, short
from covft.utils.extras import import_library

_MEGABYTES = 64  # of distances that are held at once


@dataclass(frozen=True)
class Projection:
    """Vectors along their first principal components.

    Attributes:
        points: Coordinates, shape `(N, dims)`.
        explained: Share of the variance that each component explains, shape `(dims,)`.
        components: The components, of length 1, shape `(dims, W)`.
    """

    points: np.ndarray
    explained: np.ndarray
    components: np.ndarray


@dataclass(frozen=True)
class Clusters:
    """Groups of vectors.

    Attributes:
        labels: Cluster of each sample, shape `(N,)`.
        centroids: Mean of each cluster, shape `(C, W)`.
        silhouette: Mean silhouette, from -1 to 1: near 1 for clusters far apart, near 0 for one cloud cut in pieces.
        nearest: Samples closest to each centroid, closest first; one list per cluster.
    """

    labels: np.ndarray
    centroids: np.ndarray
    silhouette: float
    nearest: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each cluster."""
        return np.bincount(self.labels, minlength=len(self.centroids)).tolist()


@dataclass(frozen=True)
class Similarity:
    """Mean cosine similarity of pairs of samples.

    Attributes:
        within: Of two samples with one label; None if no label has two.
        between: Of two samples with different labels; None for a single label.
        by_label: Within each label that has two samples or more.
    """

    within: float | None
    between: float | None
    by_label: dict[Any, float]


@check_kinds
def project(vectors: Any, dims: int = 2) -> Projection:
    """Project vectors on their first principal components, by scikit-learn.

    Memory: a copy of the vectors in float64, and W x W numbers.

    Args:
        vectors: Shape `(N, W)`.
        dims: Number of components.

    Raises:
        ConfigError: If there are fewer samples or columns than components.
        ShapeError: If the vectors cannot be used.

    Example:
        >>> project([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]], dims=1).explained.round(3).tolist()
        [1.0]
    """
    rows = rows_of(vectors, "The vectors", least=2)
    if not 1 <= dims <= min(rows.shape):
        raise ConfigError(f"dims={dims} cannot be used.", expected=f"from 1 to {min(rows.shape)}", got=dims)
    import_library("sklearn", "analysis", needed_by="project()")
    decomposition: Any = importlib.import_module("sklearn.decomposition")

    if not rows.var(axis=0).any():  # all equal: no direction explains anything
        return Projection(np.zeros((len(rows), dims)), np.zeros(dims), np.eye(dims, rows.shape[1]))
    fitted = decomposition.PCA(dims, svd_solver="covariance_eigh")
    return Projection(fitted.fit_transform(rows), fitted.explained_variance_ratio_, fitted.components_)


@check_kinds
def cluster(vectors: Any, k: int | Iterable[int] = range(2, 9), *, nearest: int = 4, seed: int = 0) -> Clusters:
    """Group vectors by k-means, by scikit-learn; of several numbers of clusters, by that of the best silhouette.

    Euclidean distances, ten starts. Memory: a copy of the vectors in float64, and 64 MB of distances.

    Args:
        vectors: Shape `(N, W)`, two different ones at least.
        k: Number of clusters, or candidates; those that are not below the number of different vectors are left out.
        nearest: Samples to name for each centroid.
        seed: Of the starts.

    Raises:
        ConfigError: If no number of clusters can be used.
        ShapeError: If the vectors cannot be used.

    Example:
        >>> found = cluster([[0.0, 0], [0, 1], [9, 9], [9, 8], [0, 0.5]])
        >>> found.sizes, found.nearest[int(found.labels[0])][0]
        ([2, 3], 4)
    """
    check_sizes(nearest=nearest)
    rows = rows_of(vectors, "The vectors", least=3)
    candidates = [k] if isinstance(k, int) else sorted(set(k))
    different = len(np.unique(rows, axis=0))
    usable = [number for number in candidates if 2 <= number <= min(different, len(rows) - 1)]
    if not usable:
        raise ConfigError(
            f"k={short(k)} cannot be used.",
            expected=f"from 2 to {min(different, len(rows) - 1)}, as there are {different} different vectors",
            got=short(k),
        )
    import_library("sklearn", "analysis", needed_by="cluster()")
    found = [_clusters(rows, number, nearest, seed) for number in usable]
    return max(found, key=lambda clusters: clusters.silhouette)


def _clusters(rows: np.ndarray, k: int, nearest: int, seed: int) -> Clusters:
    sklearn, clusters, metrics = (importlib.import_module(f"sklearn{part}") for part in ("", ".cluster", ".metrics"))
    fitted = clusters.KMeans(k, n_init=10, random_state=seed).fit(rows)
    labels, centroids = fitted.labels_, fitted.cluster_centers_
    with sklearn.config_context(working_memory=_MEGABYTES):
        silhouette = float(metrics.silhouette_score(rows, labels))
    distances = np.linalg.norm(rows - centroids[labels], axis=1)
    close = []
    for number in range(k):
        members = np.flatnonzero(labels == number)
        close.append(tuple(members[np.argsort(distances[members], kind="stable")][:nearest].tolist()))
    return Clusters(labels.astype(np.int64), centroids, silhouette, tuple(close))


@check_kinds
def similarity(vectors: Any, labels: Sequence[Any]) -> Similarity:
    r"""Compare vectors within and between groups, such as features of texts or of images in clusters of contexts.

    Means of the cosine over all pairs, exact, from sums of unit vectors:
    $\sum_{i \ne j} u_i \cdot u_j = |\sum_i u_i|^2 - \sum_i |u_i|^2$. No matrix of pairs is built.

    Args:
        vectors: Shape `(N, W)`.
        labels: Group of each sample, such as `Clusters.labels` or `Recording.kinds`; None leaves a sample out.

    Raises:
        ShapeError: If the vectors or labels cannot be used.

    Example:
        >>> similarity([[1.0, 0], [2, 0], [0, 1], [0, 3]], ["a", "a", "b", "b"]).within
        1.0
    """
    rows = rows_of(vectors, "The vectors")
    names, codes = codes_of(labels, len(rows))
    units = unit_rows(rows)
    sums = np.stack([units[codes == code].sum(axis=0) for code in range(len(names))] or [np.zeros(rows.shape[1])])
    own = np.array([np.square(units[codes == code]).sum() for code in range(len(names))] or [0.0])
    sizes = np.bincount(codes[codes >= 0], minlength=len(names)).astype(np.float64)
    squared = np.square(sums).sum(axis=1)
    pairs, total = sizes * (sizes - 1), sizes.sum()
    apart = total**2 - np.square(sizes).sum()
    alike = squared - own
    return Similarity(
        within=float(alike.sum() / pairs.sum()) if pairs.sum() else None,
        between=float((np.square(sums.sum(axis=0)).sum() - squared.sum()) / apart) if apart else None,
        by_label={name: float(alike[i] / pairs[i]) for i, name in enumerate(names) if pairs[i]},
    )
