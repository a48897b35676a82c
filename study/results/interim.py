"""Statistics, until covft.metrics has them."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass
class Estimate:
    """As in covft.metrics."""

    mean: float
    std: float | None
    low: float
    high: float
    seeds: int


def bootstrap(scores: dict, *, resamples: int, level: float) -> Estimate:
    """Return the mean over tasks and its interval."""
    tasks = [np.stack([by_task[task] for by_task in scores.values()]) for task in next(iter(scores.values()))]
    rng = np.random.default_rng(0)
    seeds = len(tasks[0])
    shares = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    if seeds > 1:
        shares = 1 / seeds + (seeds / (seeds - 1)) ** 0.5 * (shares - 1 / seeds)
    total = np.zeros(resamples)
    for values in tasks:
        number = values.shape[1]
        drawn = rng.integers(number, size=(resamples, number)) + number * np.arange(resamples)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=resamples * number).reshape(resamples, number) / number
        total += ((counts @ values.T) * shares).sum(1)
    low, high = np.quantile(total / len(tasks), [(1 - level) / 2, (1 + level) / 2])
    runs = np.mean([values.mean(1) for values in tasks], 0)
    return Estimate(float(runs.mean()), float(runs.std(ddof=1)) if seeds > 1 else None, float(low), float(high), seeds)


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
