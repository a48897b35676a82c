"""Routing: who gets which expert, how sure the router is, and whether routing follows the context.

Shapes: N samples, E experts, K kinds, L layers, W context_dim, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covft.analysis.stats.arrays import codes_of, rows_of, unit_rows
from covft.errors import ConfigError, ShapeError
from covft.utils.arguments import check_kinds

_MOST_SAMPLES = 1000  # of a correlation over pairs: half a million pairs
_AT_ONCE = 64  # resamples, or permutations, that are computed together


@dataclass(frozen=True)
class LayerRouting:
    """How one layer routes.

    Attributes:
        load: Mean weight of each expert, shape `(E,)`.
        kinds: Names of the kinds of instruction.
        by_kind: Mean weight of each expert for each kind, shape `(K, E)`.
        entropy: Mean entropy of a sample's weights in nats: 0 for one expert, log E for equal weights.
        entropy_by_kind: The same for each kind, shape `(K,)`.
        information: Mutual information of kind and expert in nats; None without kinds.
    """

    load: np.ndarray
    kinds: tuple[str, ...]
    by_kind: np.ndarray
    entropy: float
    entropy_by_kind: np.ndarray
    information: float | None


@dataclass(frozen=True)
class Specialisation:
    """How much the kind of instruction says about the expert.

    Attributes:
        information: Mutual information of kind and expert, in nats.
        most: The most that it could be: the entropy of the kinds, or log E if that is less.
        by_chance: Mean over shuffled kinds; finite samples have some information by chance.
        p_value: Share of shuffles with as much information, one-sided.
    """

    information: float
    most: float
    by_chance: float
    p_value: float


@dataclass(frozen=True)
class Correlation:
    """How the similarity of two samples in one respect goes with that in another, over pairs of samples.

    Attributes:
        r: Pearson's correlation.
        low: Lower end of the interval.
        high: Upper end of the interval.
        level: Confidence level of the interval.
        samples: Samples whose pairs were compared.
        pairs: Number of pairs.
    """

    r: float
    low: float
    high: float
    level: float
    samples: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.r:.2f} [{self.low:.2f}, {self.high:.2f}] ({100 * self.level:g} %, {self.samples} samples)"


@check_kinds
def summarise(weights: Mapping[int, Any], kinds: Sequence[Any] | None = None) -> dict[int, LayerRouting]:
    """Summarise routing weights by layer.

    Args:
        weights: Routing weights by layer, shape `(N, E)`, such as `Recording.weights`.
        kinds: Kind of each sample; None leaves a sample out of the figures by kind.

    Raises:
        ShapeError: If weights do not sum to 1, or there is another number of kinds.

    Example:
        >>> summarise({3: [[1.0, 0.0], [0.5, 0.5]]}, ["box", "caption"])[3].load.tolist()
        [0.75, 0.25]
    """
    found = {}
    for layer, values in weights.items():
        rows = _weights(values)
        names, codes = codes_of([None] * len(rows) if kinds is None else kinds, len(rows))
        entropies = _entropy(rows)
        members = [codes == code for code in range(len(names))]
        found[layer] = LayerRouting(
            load=rows.mean(axis=0),
            kinds=tuple(map(str, names)),
            by_kind=np.stack([rows[own].mean(axis=0) for own in members]) if names else np.zeros((0, rows.shape[1])),
            entropy=float(entropies.mean()),
            entropy_by_kind=np.array([entropies[own].mean() for own in members]),
            information=float(_information(rows[codes >= 0], codes[codes >= 0], len(names))) if names else None,
        )
    return found


@check_kinds
def specialisation(weights: Any, kinds: Sequence[Any], *, permutations: int = 1000, seed: int = 0) -> Specialisation:
    r"""Test whether experts specialise in kinds of instruction, in one layer.

    The joint distribution is $p(k, e) = \frac{1}{N} \sum_{n: k_n = k} g_{n,e}$. The p-value compares its mutual
    information with that of shuffled kinds, (1 + shuffles at least as large) / (1 + shuffles).

    Args:
        weights: Routing weights, shape `(N, E)`.
        kinds: Kind of each sample; None leaves a sample out.
        permutations: Number of shuffles.
        seed: Of the shuffles.

    Raises:
        ConfigError: If `permutations` cannot be used, or there are fewer than two kinds.
        ShapeError: If weights or kinds cannot be used.

    Example:
        >>> specialisation([[1, 0], [1, 0], [0, 1], [0, 1]], ["a", "a", "b", "b"]).information.__round__(3)
        0.693
    """
    if not 1 <= permutations <= 1_000_000:
        raise ConfigError(
            f"permutations={permutations} cannot be used.", expected="from 1 to 1000000", got=permutations
        )
    rows = _weights(weights)
    names, codes = codes_of(kinds, len(rows))
    if len(names) < 2:
        raise ConfigError(
            "The samples are of fewer than two kinds, so none can be told apart.",
            expected="two kinds or more",
            got=f"{len(names)}",
        )
    rows, codes = rows[codes >= 0], codes[codes >= 0]
    observed = _information(rows, codes, len(names))
    draws = np.random.default_rng(seed)
    shuffled = np.array([_information(rows, draws.permutation(codes), len(names)) for _ in range(permutations)])
    shares = np.bincount(codes) / len(codes)
    # Rounding must not tell equal shuffles apart.
    beyond = np.count_nonzero(shuffled >= observed - 1e-12)
    return Specialisation(
        information=float(observed),
        most=float(min(_entropy(shares[None])[0], np.log(rows.shape[1]))),
        by_chance=float(shuffled.mean()),
        p_value=float((1 + beyond) / (1 + permutations)),
    )


@check_kinds
def correlate(
    contexts: Any, weights: Mapping[int, Any], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Correlate how alike the contexts of two samples are with how alike they are routed (Fig. 3b of the paper).

    Both are cosines: of the context vectors of one layer, and of the routing weights of all layers, one after another.
    Pairs share samples, so the bootstrap draws samples, not pairs, and leaves out pairs of a sample with itself. Of
    more than 1,000 samples, 1,000 are drawn.

    Args:
        contexts: Context vectors, shape `(N, W)`; the paper takes those of the last adapted layer.
        weights: Routing weights by layer, shape `(N, E)`.
        resamples: Of the bootstrap.
        level: Confidence level.
        seed: Of the draws.

    Raises:
        ConfigError: If a setting cannot be used, or all samples are alike in one of the two.
        ShapeError: If contexts and weights do not fit together.
    """
    if not 10 <= resamples <= 100_000:
        raise ConfigError(f"resamples={resamples} cannot be used.", expected="from 10 to 100000", got=resamples)
    if not 0 < level < 1:
        raise ConfigError(f"level={level} cannot be used.", expected="between 0 and 1", got=level)
    x, y = (cosines - cosines.mean() for cosines in _similarities(contexts, weights, seed))
    count = len(x)
    draws = np.random.default_rng(seed)
    products = [np.ones_like(x), x, y, x * y, x * x, y * y]
    once = _weighted_r(products, np.ones((1, count)))[0]
    if not np.isfinite(once):
        raise ConfigError(
            "All contexts, or all routing weights, are alike, so they cannot be correlated.",
            expected="samples that differ",
            got="samples that are alike",
        )
    found = []
    for start in range(0, resamples, _AT_ONCE):
        drawn = draws.multinomial(count, np.full(count, 1 / count), size=min(_AT_ONCE, resamples - start))
        found.append(_weighted_r(products, drawn.astype(np.float64)))
    low, high = np.nanquantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Correlation(float(once), float(low), float(high), level, count, count * (count - 1) // 2)


@check_kinds
def pair_similarities(contexts: Any, weights: Mapping[int, Any], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return how alike the contexts, and the routing, of each pair of samples are: what `correlate` correlates.

    Args:
        contexts: As for `correlate`.
        weights: As for `correlate`.
        seed: As for `correlate`.

    Returns:
        Two arrays of cosines, one entry per pair of different samples.

    Raises:
        ShapeError: As `correlate` does.
    """
    x, y = _similarities(contexts, weights, seed)
    pairs = np.triu_indices(len(x), 1)
    return x[pairs], y[pairs]


def _similarities(contexts: Any, weights: Mapping[int, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines of all pairs of up to 1,000 samples, two arrays of shape `(N, N)`."""
    vectors = rows_of(contexts, "The contexts", least=3)
    routed = [_weights(values) for _, values in sorted(weights.items())]
    if not routed or any(len(rows) != len(vectors) for rows in routed):
        raise ShapeError(
            "Contexts and weights do not fit together.",
            expected=f"weights of {len(vectors)} samples in each layer",
            got=[len(rows) for rows in routed],
        )
    joined = np.concatenate(routed, axis=1)
    if len(vectors) > _MOST_SAMPLES:
        draws = np.random.default_rng([seed, len(vectors)])
        chosen = np.sort(draws.choice(len(vectors), _MOST_SAMPLES, replace=False))
        vectors, joined = vectors[chosen], joined[chosen]
    return _cosines(vectors), _cosines(joined)


def _cosines(rows: np.ndarray) -> np.ndarray:
    units = unit_rows(rows)
    return units @ units.T


def _weighted_r(products: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return Pearson's r over pairs of different samples, each sample drawn so many times.

    Args:
        products: 1, x, y, xy, xx and yy of each pair, shape `(N, N)`; x and y centred, so that their moments, which are
            differences of sums, lose no digits.
        counts: Shape `(R, N)`.

    Returns:
        r of each resample, shape `(R,)`; not a number where all of its pairs are alike.
    """
    size, *sums = (
        np.einsum("rn,rn->r", counts @ values, counts) - np.square(counts) @ np.diagonal(values) for values in products
    )
    x, y, xy, xx, yy = (total / size for total in sums)
    spread_x, spread_y = xx - x**2, yy - y**2
    known = (spread_x > 1e-20) & (spread_y > 1e-20)
    return np.where(known, (xy - x * y) / np.sqrt(np.where(known, spread_x * spread_y, 1.0)), np.nan)


def _weights(values: Any) -> np.ndarray:
    rows = rows_of(values, "The weights")
    if (rows < -1e-3).any() or np.abs(rows.sum(axis=1) - 1).max() > 1e-2:
        raise ShapeError(
            "The routing weights of a sample do not sum to 1.",
            expected="rows of shares",
            got=f"sums up to {rows.sum(1).max()}",
        )
    return rows


def _entropy(rows: np.ndarray) -> np.ndarray:
    logs = np.log(np.where(rows > 0, rows, 1))
    return -(rows * logs).sum(axis=1)


def _information(rows: np.ndarray, codes: np.ndarray, kinds: int) -> float:
    """Return the mutual information of kind and expert, in nats."""
    member = np.zeros((kinds, len(rows)))
    member[codes, np.arange(len(rows))] = 1
    joint = member @ rows / rows.sum()
    alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / alone[there])).sum())
