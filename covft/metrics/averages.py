"""The means of the CoVFT paper: of each group of benchmarks, and of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

from covft.errors import ConfigError
from covft.utils.arguments import check_kinds

PAPER_GROUPS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "general": ("MME", "MMBench-en", "MMBench-cn", "GQA"),
        "knowledge and OCR": ("ScienceQA", "AI2D", "TextVQA"),
        "vision-centric": ("MMVP", "RealWorldQA", "CV-Bench-COCO", "CV-Bench-ADE", "CV-Bench-Omni3D"),
    }
)
"""The twelve benchmarks of the CoVFT paper by group, in the order of its Table 1. MME is its perception score."""

PAPER_DIVISORS: Mapping[str, float] = MappingProxyType({"MME": 20.0})
"""What scores are divided by before they are averaged: MME's perception score goes to 2000, the others to 100."""


@dataclass(frozen=True)
class Averages:
    """Means of scores.

    Attributes:
        groups: Mean of each group.
        mean: Mean of all benchmarks.
    """

    groups: dict[str, float]
    mean: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in {**self.groups, "mean": self.mean}.items())


@check_kinds
def averages(
    scores: Mapping[str, float],
    groups: Mapping[str, Sequence[str]] = PAPER_GROUPS,
    divisors: Mapping[str, float] = PAPER_DIVISORS,
) -> Averages:
    r"""Average scores in the CoVFT paper's way.

    Group $G$ has $\frac{1}{|G|} \sum_{b \in G} s_b / d_b$. The mean is that of all benchmarks,
    $\frac{1}{\sum |G|} \sum_G \sum_{b \in G} s_b / d_b$, not the mean of the groups: a larger group counts more. $d$ is
    20 for MME's perception score and 1 for all others (CoVFT paper, Table 1 and first footnote of its supplement).

    Args:
        scores: Score of each benchmark. Those in no group are left out.
        groups: Benchmarks of each group, by default the paper's twelve.
        divisors: What the scores of some benchmarks are divided by.

    Raises:
        ConfigError: If a group is empty, a benchmark has no score, or a divisor is 0.

    Example:
        >>> print(averages({"MME": 1500, "GQA": 65, "AI2D": 56}, {"general": ["MME", "GQA"], "knowledge": ["AI2D"]}))
        general 70.00, knowledge 56.00, mean 65.33
    """
    names = [name for group in groups.values() for name in group]
    if not names or not all(groups.values()):
        raise ConfigError(
            "A group without benchmarks has no mean.", expected="benchmarks in each group", got=dict(groups)
        )
    scaled = on_one_scale(scores, names, divisors)
    means = {group: fmean(scaled[name] for name in members) for group, members in groups.items()}
    return Averages(means, fmean(scaled[name] for name in names))


def on_one_scale(scores: Mapping[str, float], names: Sequence[str], divisors: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of some benchmarks, divided by their divisors.

    Args:
        scores: Score of each benchmark.
        names: The benchmarks that are wanted.
        divisors: What the scores of some benchmarks are divided by.

    Raises:
        ConfigError: If a benchmark has no score, or a divisor is 0.
    """
    missing = [name for name in names if name not in scores]
    if missing:
        raise ConfigError(
            f"The score of {_listed(missing)} is missing.", expected=_listed(names), got=_listed(scores) or "none"
        )
    if not all(divisors.values()):
        raise ConfigError("Scores cannot be divided by 0.", expected="divisors other than 0", got=dict(divisors))
    return {name: scores[name] / divisors.get(name, 1.0) for name in names}


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
