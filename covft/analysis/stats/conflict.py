r"""Gradient conflict: whether kinds of instruction pull the weights of a tower in different directions.

All numbers are cosines of gradients of single samples, per block and as the mean over the blocks.

- The dominant direction is the first principal direction of the updates: the unit vector $v$ that maximises
  $\sum_i \langle g_i, v \rangle^2$, signed so that the mean cosine with it is not negative (the paper's Fig. 5).
- $c_{ab}$ is the mean cosine of samples of kind $a$ with samples of kind $b$, of two different samples where $a = b$.
- The alignment of two kinds, $c_{ab} / \sqrt{c_{aa} c_{bb}}$, is the cosine of their mean (unit) gradients, without the
  noise of single samples: the correction for attenuation (Spearman 1904). 1: one direction; 0: unrelated; -1: opposed.
- The separation, the mean of $c_{aa}$ less the mean of $c_{ab}$, is what the permutation test tests: kinds that do not
  matter can be exchanged among the samples without changing it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from covft.analysis.stats.gradients import Gradients
from covft.errors import ConfigError, ShapeError
from covft.metrics import Estimate, bootstrap, holm
from covft.utils.arguments import check_kinds
from covft.utils.sketch import along_first_direction

FEWEST = 3  # samples of a kind
_AT_ONCE = 64  # resamples


@dataclass(frozen=True, eq=False)
class Dominance:
    """Cosines of updates with their first principal direction.

    Attributes:
        cosines: Of each update, N.
        mean: Their mean, with a bootstrap interval over the updates.
        std: Their standard deviation.
        explained: Share of the updates' squared length that lies in the direction.
        chance: Root mean square of the cosines of N updates without any direction in common, in a space of many
            dimensions: the direction is fitted to the same updates.
    """

    cosines: np.ndarray
    mean: Estimate
    std: float
    explained: float
    chance: float


@dataclass(frozen=True, eq=False)
class Conflict:
    """How gradients of different kinds of instruction go together.

    Arrays with an axis of blocks have one entry more at the end: the mean over the blocks.

    Attributes:
        kinds: Kinds of instruction, K.
        counts: Samples of each.
        layers: The blocks, L.
        cosines: Mean cosines, `(L + 1, K, K)`.
        alignment: Alignments, `(L + 1, K, K)`, within [-1, 1]; NaN where the samples of a kind have no direction in
            common.
        low: Lower ends of their bootstrap intervals over the samples.
        high: Upper ends.
        separation: Mean cosine within kinds less that between them, L + 1.
        p_values: Of the permutation test of the separation, L + 1; those of the blocks are adjusted by Holm's method.
        pair_p_values: Of each pair of kinds, over all blocks, `(K, K)`, adjusted by Holm's method; 1 on the diagonal.
        level: Confidence level of the intervals.
    """

    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    layers: tuple[int, ...]
    cosines: np.ndarray
    alignment: np.ndarray
    low: np.ndarray
    high: np.ndarray
    separation: np.ndarray
    p_values: np.ndarray
    pair_p_values: np.ndarray
    level: float

    @property
    def p_value(self) -> float:
        """Probability of so large a separation, over all blocks, if kinds did not matter."""
        return float(self.p_values[-1])

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield the pairs of different kinds, as indices."""
        yield from itertools.combinations(range(len(self.kinds)), 2)


@check_kinds
def dominance(gradients: Gradients, layer: int | None = None, *, resamples: int = 2000, seed: int = 0) -> Dominance:
    """Measure how far updates agree with their dominant direction.

    Args:
        gradients: Gradients of samples, or of batches, in any order.
        layer: The block; None takes the weights of all blocks as one vector.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ShapeError: If there are no updates, or all are zero.
        LayerIndexError: If there are no gradients of the block.
    """
    vectors = gradients.vectors if layer is None else gradients.vectors[:, gradients.position(layer)]
    rows = vectors.reshape(len(vectors), -1)
    if not rows.any():
        raise ShapeError("Updates of zero have no direction.", expected="gradients", got=f"{len(rows)} of zero")
    cosines, explained = along_first_direction(rows)
    mean = bootstrap({0: {"cosine": cosines.tolist()}}, resamples=resamples, seed=seed)
    return Dominance(
        cosines=cosines,
        mean=mean,
        std=float(cosines.std(ddof=1)) if len(cosines) > 1 else 0.0,
        explained=explained,
        chance=float(len(rows) ** -0.5),
    )


@check_kinds
def conflict(
    gradients: Gradients, *, resamples: int = 1000, permutations: int = 999, level: float = 0.95, seed: int = 0
) -> Conflict:
    """Measure how gradients of different kinds of instruction go together, per block and over all.

    Samples have to be independent of each other: take different images.

    Args:
        gradients: Gradients of samples, of two kinds or more.
        resamples: Of the bootstrap, within each kind.
        permutations: Of the kinds, for the test.
        level: Confidence level of the intervals.
        seed: Of both.

    Raises:
        ShapeError: If there are fewer than two kinds, or fewer than three samples of one.
        ConfigError: If a setting cannot be used.
    """
    for name, value in (("resamples", resamples), ("permutations", permutations)):
        if not 1 <= value <= 100_000:
            raise ConfigError(f"{name}={value} cannot be used.", expected="a whole number from 1 to 100000", got=value)
    if not 0 < level < 1:
        raise ConfigError(f"level={level} cannot be used.", expected="a number between 0 and 1", got=level)
    kinds, of_kind_KN = _members(gradients.kinds)
    draws = np.random.default_rng(seed)
    drawn_RKN = _redrawn(of_kind_KN, resamples, draws)
    order_RN = np.stack([draws.permutation(of_kind_KN.shape[1]) for _ in range(permutations)])
    found: list[dict[str, Any]] = []
    overall = np.zeros((of_kind_KN.shape[1],) * 2)
    for layer in gradients.layers:
        gram = gradients.cosines(layer)
        overall += gram / len(gradients.layers)
        found.append(_of_block(gram, of_kind_KN, drawn_RKN, order_RN, level))
    found.append(_of_block(overall, of_kind_KN, drawn_RKN, order_RN, level))
    p_values = [one["p_value"] for one in found]
    stacked = {name: np.stack([one[name] for one in found]) for name in ("cosines", "alignment", "low", "high")}
    return Conflict(
        kinds=kinds,
        counts=tuple(int(count) for count in of_kind_KN.sum(1)),
        layers=gradients.layers,
        separation=np.array([one["separation"] for one in found]),
        p_values=np.array([*holm(p_values[:-1]), p_values[-1]]),
        pair_p_values=_pair_p_values(overall, of_kind_KN, permutations, draws),
        level=level,
        **stacked,
    )


def _members(labels: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the kinds, and which samples are of each, `(K, N)`."""
    kinds = tuple(sorted(set(labels)))
    members = np.array([[label == kind for label in labels] for kind in kinds], dtype=np.float64)
    few = [f"{int(row.sum())} of {kind!r}" for kind, row in zip(kinds, members, strict=True) if row.sum() < FEWEST]
    if len(kinds) < 2 or few:
        raise ShapeError(
            "Kinds cannot be compared.",
            expected=f"two kinds or more, of {FEWEST} samples or more each",
            got=", ".join(few) or f"only {kinds[0]!r}" if kinds else "no samples",
        )
    return kinds, members


def _of_block(
    gram: np.ndarray, of_kind_KN: np.ndarray, drawn_RKN: np.ndarray, order_RN: np.ndarray, level: float
) -> dict[str, Any]:
    """Return what is known of one block, from the cosines of its gradients."""
    cosines = mean_cosines(gram, of_kind_KN[None])[0]
    resampled = np.concatenate([alignments(mean_cosines(gram, part)) for part in _parts(drawn_RKN)])
    separation = float(separations(cosines[None])[0])
    permuted = np.concatenate(
        [separations(mean_cosines(gram, of_kind_KN[:, part].transpose(1, 0, 2))) for part in _parts(order_RN)]
    )
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.nanquantile(np.where(np.isfinite(resampled).any(0), resampled, 0.0), tails, axis=0)
    aligned = alignments(cosines[None])[0]
    unknown = np.isnan(aligned)
    return {
        "cosines": cosines,
        "alignment": aligned,
        "low": np.where(unknown, np.nan, low),
        "high": np.where(unknown, np.nan, high),
        "separation": separation,
        "p_value": _share_beyond(permuted, separation),
    }


def _pair_p_values(
    gram: np.ndarray, of_kind_KN: np.ndarray, permutations: int, draws: np.random.Generator
) -> np.ndarray:
    """Test each pair of kinds among their own samples."""
    count = len(of_kind_KN)
    pairs = list(itertools.combinations(range(count), 2))
    found = []
    for a, b in pairs:
        samples = np.flatnonzero(of_kind_KN[a] + of_kind_KN[b])
        own, members = gram[samples][:, samples], of_kind_KN[[a, b]][:, samples]
        order = np.stack([draws.permutation(len(samples)) for _ in range(permutations)])
        permuted = np.concatenate(
            [separations(mean_cosines(own, members[:, part].transpose(1, 0, 2))) for part in _parts(order)]
        )
        found.append(_share_beyond(permuted, float(separations(mean_cosines(own, members[None]))[0])))
    p_values = np.ones((count, count))
    for (a, b), p_value in zip(pairs, holm(found), strict=True):
        p_values[a, b] = p_values[b, a] = p_value
    return p_values


def mean_cosines(gram: np.ndarray, weights_RKN: np.ndarray) -> np.ndarray:
    """Return mean cosines of kinds, `(R, K, K)`, with samples weighted; a sample is not paired with itself.

    Args:
        gram: Cosines of all samples, `(N, N)`.
        weights_RKN: How often each sample counts for each kind.
    """
    sums = weights_RKN @ gram @ weights_RKN.transpose(0, 2, 1)
    totals = weights_RKN.sum(2)
    pairs = totals[:, :, None] * totals[:, None, :]
    each = np.arange(weights_RKN.shape[1])
    sums[:, each, each] -= (weights_RKN**2) @ gram.diagonal()
    pairs[:, each, each] -= (weights_RKN**2).sum(2)
    return np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)


def alignments(cosines_RKK: np.ndarray) -> np.ndarray:
    """Return the alignments of kinds, `(R, K, K)`; NaN where one has no direction in common."""
    within = cosines_RKK.diagonal(axis1=1, axis2=2)
    product = within[:, :, None] * within[:, None, :]
    known = (within[:, :, None] > 0) & (within[:, None, :] > 0)
    root = np.sqrt(np.where(known, product, 1.0))
    return np.where(known, np.clip(cosines_RKK / root, -1, 1), np.nan)


def separations(cosines_RKK: np.ndarray) -> np.ndarray:
    """Return mean cosines within kinds less those between kinds, R."""
    count = cosines_RKK.shape[1]
    within = cosines_RKK.diagonal(axis1=1, axis2=2).mean(1)
    between = (cosines_RKK.sum((1, 2)) - count * within) / (count * (count - 1))
    return within - between


def _redrawn(of_kind_KN: np.ndarray, resamples: int, draws: np.random.Generator) -> np.ndarray:
    """Draw the samples of each kind anew, `(R, K, N)`: how often each sample was drawn."""
    drawn = np.zeros((resamples, *of_kind_KN.shape))
    for kind, members in enumerate(of_kind_KN):
        samples = np.flatnonzero(members)
        drawn[:, kind, samples] = draws.multinomial(len(samples), np.full(len(samples), 1 / len(samples)), resamples)
    return drawn


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _AT_ONCE):
        yield array[start : start + _AT_ONCE]


def _share_beyond(permuted: np.ndarray, value: float) -> float:
    """Return the p-value of a permutation test; the unpermuted order counts as one."""
    return float((1 + np.count_nonzero(permuted >= value - 1e-12)) / (1 + len(permuted)))
