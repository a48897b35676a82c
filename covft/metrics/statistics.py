"""How sure a score or a difference of two methods is: bootstrap intervals, sign test, Holm's correction.

Scores come by run, task and question: `{seed: {task: [score of each question]}}`, where every run answers the same
questions. Results are in the unit of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covft.errors import ConfigError, ShapeError
from covft.utils.arguments import check_kinds, short

_MOST_RESAMPLES = 1_000_000
_DRAWN_AT_ONCE = 4_000_000  # questions, in 8 bytes each


@dataclass(frozen=True)
class Estimate:
    """The mean of a score over tasks and runs, and how sure it is.

    Attributes:
        mean: Mean over tasks of the mean over runs and questions.
        std: Standard deviation of the runs' means; None of a single run.
        low: Lower end of the interval.
        high: Upper end of the interval.
        level: Confidence level of the interval.
        seeds: Number of runs.
        tasks: Mean of each task over runs and questions.
    """

    mean: float
    std: float | None
    low: float
    high: float
    level: float
    seeds: int
    tasks: dict[str, float]

    def __str__(self) -> str:
        return f"{self.mean:.2f} {self._interval()}"

    def _interval(self) -> str:
        runs = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"[{self.low:.2f}, {self.high:.2f}] ({100 * self.level:g} %, {runs})"


@dataclass(frozen=True)
class Difference(Estimate):
    """An `Estimate` of the difference of two methods.

    Attributes:
        p_value: Two-sided, of the hypothesis that there is no difference, from the same resamples.
    """

    p_value: float

    @property
    def wins(self) -> int:
        """Number of tasks with a difference above 0."""
        return sum(value > 0 for value in self.tasks.values())

    @property
    def losses(self) -> int:
        """Number of tasks with a difference below 0."""
        return sum(value < 0 for value in self.tasks.values())

    def __str__(self) -> str:
        return f"{self.mean:+.2f} {self._interval()}"


@check_kinds
def bootstrap(
    scores: Mapping[Any, Mapping[str, Sequence[Any]]], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Estimate the mean score of one method, with a percentile interval by a bootstrap over runs and questions.

    Each resample draws as many runs as there are, and within each task as many questions as it has, both with
    replacement. All runs answer the same questions, so the drawn questions are the same for all drawn runs. The value
    of a resample is the mean over tasks of the mean over its runs and questions. The deviations of drawn runs from the
    mean run are widened by the root of S / (S - 1), since S drawn runs vary less than S new ones; so the interval of a
    score near its limit may reach beyond it.

    Args:
        scores: Score of each question by run and task, `{seed: {task: [...]}}`.
        resamples: Number of resamples.
        level: Confidence level.
        seed: Of the resamples.

    Raises:
        ConfigError: If a setting cannot be used.
        ShapeError: If runs do not have the same tasks and numbers of questions, or scores are not finite numbers.

    Example:
        >>> print(bootstrap({0: {"count": [1, 1, 0, 1, 0, 0]}, 1: {"count": [1, 0, 0, 1, 0, 0]}}))
        0.42 [0.00, 0.87] (95 %, 2 seeds)
    """
    _check_settings(resamples, level, seed)
    tasks = _by_task(scores, "scores")
    return Estimate(**_summary(tasks, _resampled(tasks, resamples, seed), level))


@check_kinds
def paired_bootstrap(
    a: Mapping[Any, Mapping[str, Sequence[Any]]],
    b: Mapping[Any, Mapping[str, Sequence[Any]]],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Estimate the mean difference a - b of two methods, paired by run and by question.

    Differences are taken question by question between runs of the same seed, and resampled as `bootstrap` does: pairs
    stay together. Intervals of few runs are too narrow where the difference varies from run to run alone, and too wide
    where it varies from answer to answer alone.

    Args:
        a: Score of each question by run and task, `{seed: {task: [...]}}`.
        b: The same of the other method, with the same seeds, tasks and questions.
        resamples: Number of resamples.
        level: Confidence level.
        seed: Of the resamples.

    Raises:
        ConfigError: If a setting cannot be used.
        ShapeError: If the two do not have the same seeds, tasks and numbers of questions, or scores are not finite
            numbers.

    Example:
        >>> a = {0: {"count": [1, 1, 0, 1], "size": [1, 1]}, 1: {"count": [1, 1, 1, 1], "size": [0, 1]}}
        >>> b = {0: {"count": [1, 0, 0, 1], "size": [1, 0]}, 1: {"count": [0, 1, 0, 1], "size": [0, 1]}}
        >>> difference = paired_bootstrap(a, b)
        >>> difference.mean, difference.wins, difference.losses
        (0.3125, 2, 0)
    """
    _check_settings(resamples, level, seed)
    if set(a) != set(b):
        raise ShapeError("Runs are paired by seed.", expected=f"seeds {short(list(a))}", got=f"seeds {short(list(b))}")
    first, second = _by_task(a, "a"), _by_task({run: b[run] for run in a}, "b")
    sizes = ({task: values.shape[1] for task, values in scores.items()} for scores in (first, second))
    expected, got = sizes
    if expected != got:
        raise ShapeError("Answers are paired by task and question.", expected=short(expected), got=short(got))
    tasks = {task: first[task] - second[task] for task in first}
    means = _resampled(tasks, resamples, seed)
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p_value = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    return Difference(**_summary(tasks, means, level), p_value=float(p_value))


def _check_settings(resamples: int, level: float, seed: int) -> None:
    if not 1 <= resamples <= _MOST_RESAMPLES:
        expected = f"a whole number from 1 to {_MOST_RESAMPLES}"
        raise ConfigError(f"resamples={short(resamples)} cannot be used.", expected=expected, got=resamples)
    if not 0 < level < 1:
        raise ConfigError(
            f"level={level} cannot be used.", expected="a number between 0 and 1, such as 0.95", got=level
        )
    if seed < 0:
        raise ConfigError(f"seed={short(seed)} cannot be used.", expected="a whole number from 0", got=seed)


def _by_task(scores: Mapping[Any, Mapping[str, Sequence[Any]]], name: str) -> dict[str, np.ndarray]:
    """Return the scores of each task, (runs, questions)."""
    if not scores or not all(scores.values()):
        raise ShapeError(f"{name} is empty.", expected="{seed: {task: [scores]}}", got=short(scores))
    first: Hashable = next(iter(scores))
    tasks = {}
    for run, by_task in scores.items():
        if set(by_task) != set(scores[first]):
            raise ShapeError(
                f"{name}: the runs {short(first)} and {short(run)} have other tasks.",
                expected=sorted(scores[first]),
                got=sorted(by_task),
            )
    for task in scores[first]:
        runs = [_numbers(scores[run][task], f"{name}[{short(run)}][{task!r}]") for run in scores]
        sizes = sorted({len(run) for run in runs})
        if len(sizes) > 1:
            raise ShapeError(
                f"{name}: every run answers the same questions of {task}.", expected=sizes[0], got=sizes[1:]
            )
        tasks[task] = np.stack(runs)
    return tasks


def _numbers(values: Sequence[Any], name: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"{name} is not a list of numbers.", expected="one number per question", got=short(values)
        ) from error
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise ShapeError(f"{name} cannot be used.", expected="one finite number per question", got=short(values))
    return numbers


def _resampled(tasks: dict[str, np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """Return the mean over tasks of each resample, (resamples,)."""
    draws = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // max(values.shape[1] for values in tasks.values()))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    return np.concatenate([_some_resampled(tasks, size, draws) for size in sizes])


def _some_resampled(tasks: dict[str, np.ndarray], resamples: int, draws: np.random.Generator) -> np.ndarray:
    runs = len(next(iter(tasks.values())))
    shares = _drawn_shares(draws, runs, resamples)
    if runs > 1:
        shares = 1 / runs + math.sqrt(runs / (runs - 1)) * (shares - 1 / runs)
    total = np.zeros(resamples)
    for values in tasks.values():
        by_run = _drawn_shares(draws, values.shape[1], resamples) @ values.T
        total += np.einsum("rs,rs->r", by_run, shares)
    return total / len(tasks)


def _drawn_shares(draws: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """Return how often each of `count` things was drawn among `count` draws, as a share, (resamples, count)."""
    drawn = draws.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count) / count


def _summary(tasks: dict[str, np.ndarray], means: np.ndarray, level: float) -> dict[str, Any]:
    by_run = np.mean([values.mean(axis=1) for values in tasks.values()], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {
        "mean": float(by_run.mean()),
        "std": float(by_run.std(ddof=1)) if len(by_run) > 1 else None,
        "low": float(low),
        "high": float(high),
        "level": level,
        "seeds": len(by_run),
        "tasks": {task: float(values.mean()) for task, values in tasks.items()},
    }


@check_kinds
def sign_test(wins: int, losses: int) -> float:
    r"""Return the two-sided p-value of the sign test: how likely so uneven a count is if both were equally likely.

    $p = \min\left(1,\, 2 \sum_{k=0}^{\min(w, l)} \binom{w + l}{k} 2^{-(w + l)}\right)$. Ties are left out.

    Args:
        wins: On how many tasks the one method is better.
        losses: On how many the other is.

    Raises:
        ConfigError: If a count is negative or above 100,000.

    Example:
        >>> sign_test(10, 2)
        0.03857421875
    """
    for name, count in (("wins", wins), ("losses", losses)):
        if not 0 <= count <= 100_000:
            raise ConfigError(f"{name}={short(count)} cannot be used.", expected="a count up to 100000", got=count)
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**trials)


@check_kinds
def holm(p_values: Sequence[float]) -> list[float]:
    r"""Adjust p-values of several hypotheses by Holm's step-down method.

    In ascending order, $\tilde p_{(i)} = \max_{j \le i} \min\left(1,\, (m - j + 1)\, p_{(j)}\right)$. Those that are at
    most α may be rejected together: the probability of rejecting any true hypothesis is then at most α (Holm 1979).

    Args:
        p_values: One per hypothesis.

    Returns:
        The adjusted ones, in the order given.

    Raises:
        ConfigError: If one is not from 0 to 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ConfigError("A p-value is a probability.", expected="numbers from 0 to 1", got=short(list(p_values)))
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = largest
    return adjusted
