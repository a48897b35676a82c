"""Differences between groups of runs, with intervals.

Runs of one seed start from the same projector and see the data in the same order, and all runs answer the same
questions. So differences are taken within a seed and a question, and the bootstrap draws seeds and, in each task,
questions. Every comparison here, from one mean to a difference of differences, is a weighted sum of mean scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from covft import metrics
from study.results.load import Group

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Term:
    """One mean in a weighted sum: of a group's scores over tasks.

    Attributes:
        weight: Its weight.
        group: The runs.
        tasks: The tasks; each counts the same.
    """

    weight: float
    group: Group
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The number, mostly in percentage points.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: Number of seeds behind it.
        tasks: Number of tasks behind it.
        deviation: Standard deviation over the seeds; None of one seed.
    """

    value: float
    low: float
    high: float
    seeds: int
    tasks: int
    deviation: float | None = None

    @property
    def sign(self) -> int:
        """1 if the interval is above 0, -1 if below, 0 if it contains 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def negated(self) -> Estimate:
        """Return the same comparison the other way round."""
        return replace(self, value=-self.value, low=-self.high, high=-self.low)


@dataclass(frozen=True)
class Wins:
    """Tasks on which one group is better.

    Attributes:
        won: Tasks with a higher mean.
        lost: Tasks with a lower mean.
        tied: Tasks with the same mean.
        p: Two-sided p-value of the sign test, without ties.
    """

    won: int
    lost: int
    tied: int
    p: float


def contrast(terms: Sequence[Term]) -> Estimate | None:
    """Estimate a weighted sum of mean scores; None without a common seed or without tasks.

    Args:
        terms: The means. All are paired by seed and by question.
    """
    return _contrast(tuple(terms))


@lru_cache(maxsize=4096)  # tables, figures and verdicts ask for the same ones
def _contrast(terms: tuple[Term, ...]) -> Estimate | None:
    found = _sums(terms)
    if found is None:
        return None
    drawn = metrics.bootstrap(found, resamples=RESAMPLES, level=LEVEL)
    tasks = len(next(iter(found.values())))
    return Estimate(drawn.mean, drawn.low, drawn.high, drawn.seeds, tasks, drawn.std)


def mean(group: Group, tasks: Iterable[str]) -> Estimate | None:
    """Estimate the mean score of a group over tasks; None if it was not scored on all of them."""
    tasks = tuple(tasks)
    return contrast([Term(1, group, tasks)]) if tasks and set(tasks) <= set(group.tasks) else None


def difference(ours: Group, theirs: Group, tasks: Iterable[str]) -> Estimate | None:
    """Estimate the difference of mean scores over the tasks that both were scored on."""
    tasks = common(tasks, ours, theirs)
    return contrast([Term(1, ours, tasks), Term(-1, theirs, tasks)]) if tasks else None


def share(part: Sequence[Term], whole: Sequence[Term]) -> Estimate | None:
    """Estimate the ratio of two sums in percent; None if the interval of the second is not above 0.

    The interval has the ratios r for which that of `part - r * whole` contains 0 (Fieller's way).

    Args:
        part: The numerator.
        whole: The denominator.
    """
    # zero weights: both over the seeds that all of them have
    top = contrast([*part, *(replace(term, weight=0) for term in whole)])
    bottom = contrast([*whole, *(replace(term, weight=0) for term in part)])
    if top is None or bottom is None or bottom.sign <= 0:
        return None

    def rest(ratio: float) -> Estimate:
        found = contrast([*part, *(replace(term, weight=-ratio * term.weight) for term in whole)])
        assert found is not None
        return found

    value = top.value / bottom.value
    width = (top.high - top.low) / 2 / bottom.value
    low = _crossing(lambda ratio: rest(ratio).low, value, value - width)
    high = _crossing(lambda ratio: rest(ratio).high, value, value + width)
    return Estimate(100 * value, 100 * low, 100 * high, top.seeds, top.tasks)


def _crossing(end: Callable[[float], float], near: float, far: float) -> float:
    """Return where a nearly linear function is 0, by secants from two places."""
    at_near, at_far = end(near), end(far)
    for _ in range(12):
        if abs(at_far - at_near) < 1e-9:
            break
        near, far, at_near = far, far - at_far * (far - near) / (at_far - at_near), at_far
        at_far = end(far)
        if abs(far - near) < 2e-3:
            break
    return far


def wins(ours: Group, theirs: Group, tasks: Iterable[str]) -> Wins | None:
    """Count the tasks with a higher mean over the common seeds, and test the count; None without a common seed."""
    seeds = sorted(set(ours.rows) & set(theirs.rows))
    tasks = common(tasks, ours, theirs)
    if not seeds or not tasks:
        return None
    apart = [
        float(np.mean([ours.rows[s].hits[task].mean() - theirs.rows[s].hits[task].mean() for s in seeds]))
        for task in tasks
    ]
    apart = [0.0 if abs(value) < 1e-9 else value for value in apart]
    won, lost = sum(value > 0 for value in apart), sum(value < 0 for value in apart)
    return Wins(won, lost, len(apart) - won - lost, metrics.sign_test(won, lost))


def holm(found: dict[str, Wins | None]) -> dict[str, float]:
    """Correct the p-values of several comparisons with one reference; absent ones are left out."""
    known = {label: each.p for label, each in found.items() if each is not None}
    return dict(zip(known, metrics.holm(list(known.values())), strict=True))


def common(tasks: Iterable[str], *groups: Group) -> tuple[str, ...]:
    """Return the tasks that all groups were scored on, in their order."""
    return tuple(task for task in tasks if all(task in group.tasks for group in groups))


def _sums(terms: Sequence[Term]) -> dict[int, dict[str, Any]] | None:
    """Return the weighted sum of scores by seed, task and question, in points.

    The mean of the sum over questions and tasks, each task counting the same, is the sum of the means.
    """
    if not terms:
        return None
    seeds = sorted(set.intersection(*(set(term.group.rows) for term in terms)))
    tasks = list(dict.fromkeys(task for term in terms for task in term.tasks))
    if not seeds or not tasks or not all(set(term.tasks) <= set(term.group.tasks) for term in terms):
        return None
    found: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        found[seed] = dict.fromkeys(tasks, 0.0)
        for term in terms:
            weight = 100 * term.weight * len(tasks) / len(term.tasks)
            for task in term.tasks:
                found[seed][task] = found[seed][task] + weight * term.group.rows[seed].hits[task]
    return found
