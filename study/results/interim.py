"""Statistics, until covft.metrics has them."""

from __future__ import annotations

from math import comb

import numpy as np


def _draws(tasks: list[np.ndarray], resamples: int) -> np.ndarray:
    """Return resampled means over tasks; the same draws for arrays of the same shapes."""
    rng = np.random.default_rng(0)
    seeds = len(tasks[0])
    chosen = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    total = np.zeros(resamples)
    for values in tasks:
        number = values.shape[1]
        counts = rng.multinomial(number, np.full(number, 1 / number), resamples)
        total += ((chosen @ values) * counts).sum(1) / (seeds * number)
    return total / len(tasks)


def _mean(tasks: list[np.ndarray]) -> float:
    return float(np.mean([values.mean() for values in tasks]))


def _interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(tasks: list[np.ndarray], *, resamples: int, level: float) -> tuple[float, float, float]:
    """Return the mean over tasks and its interval."""
    return (_mean(tasks), *_interval(_draws(tasks, resamples), level))


def ratio_bootstrap(
    top: list[np.ndarray], bottom: list[np.ndarray], *, resamples: int, level: float
) -> tuple[float, float, float]:
    """Return the ratio of two means over tasks and its interval."""
    draws = _draws(top, resamples) / _draws(bottom, resamples)
    return (_mean(top) / _mean(bottom), *_interval(draws, level))


def sign_test(won: int, lost: int) -> float:
    """Return the two-sided p-value."""
    number, least = won + lost, min(won, lost)
    return min(1.0, 2 * sum(comb(number, k) for k in range(least + 1)) / 2**number) if number else 1.0


def holm(p_values: list[float]) -> list[float]:
    """Return corrected p-values."""
    order = np.argsort(p_values, kind="stable")
    found, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = highest
    return found


GROUPS = {
    "general": ("existence", "choice", "choice_german", "attributes"),
    "knowledge": ("word", "digit", "diagram"),
    "vision": ("pairs", "photo", "count", "relation", "size"),
    "conflict": ("grounding", "caption"),
}
