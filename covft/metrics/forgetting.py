"""What tuning on downstream sets improved there, and what it lost on upstream ones.

The three numbers of "Keeping Yourself is Important in Downstream Tuning Multimodal Large Language Model",
arXiv 2503.04543: specialisation improvement E, stabilisation forgetting F, and their balance O. Downstream sets are
what the model is tuned for, upstream ones what it could do before; zero-shot scores are those before tuning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean

from covft.errors import ConfigError
from covft.metrics.averages import PAPER_DIVISORS, on_one_scale
from covft.utils.arguments import check_kinds


@dataclass(frozen=True)
class ForgettingReport:
    """What tuning improved and what it forgot, in points of the scores.

    Attributes:
        improvement: E, the mean improvement over zero-shot on the downstream sets.
        forgotten: F, the mean loss on the upstream sets; negative where they improved.
        overall: O, the mean of the mean downstream and the mean upstream score after tuning.
        downstream: Scores of each downstream set before and after.
        upstream: Scores of each upstream set before and after.
    """

    improvement: float
    forgotten: float
    overall: float
    downstream: dict[str, tuple[float, float]]
    upstream: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        """Return a table for a terminal."""
        width = max(len(name) for name in ("downstream", *self.downstream, *self.upstream))
        lines = [f"E {self.improvement:+.2f}   F {self.forgotten:+.2f}   O {self.overall:.2f}"]
        for title, sets in (("downstream", self.downstream), ("upstream", self.upstream)):
            lines.append(f"{title:<{width + 2}}  before   after  change")
            lines += [f"  {n:<{width}}{old:>8.2f}{new:>8.2f}{new - old:>+8.2f}" for n, (old, new) in sets.items()]
        return "\n".join(lines)


@check_kinds
def forgetting(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    downstream: Collection[str],
    upstream: Collection[str],
    divisors: Mapping[str, float] = PAPER_DIVISORS,
) -> ForgettingReport:
    """Report what tuning improved on downstream sets and what it forgot on upstream ones: E, F and O.

    Args:
        before: Scores of the model before it was tuned, by set; the higher, the better.
        after: Scores of the tuned model.
        downstream: Names of the sets that it was tuned for.
        upstream: Names of the sets that it was not to forget.
        divisors: What the scores of some sets are divided by first, so that all have the same scale.

    Raises:
        ConfigError: If there is no downstream or no upstream set, a set is both, or has no score.

    Example:
        >>> print(
        ...     forgetting(
        ...         {"IconQA": 20, "GQA": 62, "TextVQA": 58},
        ...         {"IconQA": 80, "GQA": 58, "TextVQA": 52},
        ...         downstream=["IconQA"],
        ...         upstream=["GQA", "TextVQA"],
        ...     )
        ... )
        E +60.00   F +5.00   O 67.50
        downstream    before   after  change
          IconQA       20.00   80.00  +60.00
        upstream      before   after  change
          GQA          62.00   58.00   -4.00
          TextVQA      58.00   52.00   -6.00
    """
    both = [str(name) for name in downstream if name in upstream]
    if both:
        raise ConfigError(
            f"{', '.join(both)} cannot be both downstream and upstream.", expected="one of the two", got="both"
        )
    old, new = (on_one_scale(scores, [*downstream, *upstream], divisors) for scores in (before, after))
    tuned_for, kept = ({name: (old[name], new[name]) for name in names} for names in (downstream, upstream))
    return ForgettingReport(
        improvement=improvement(*_before_and_after(tuned_for)),
        forgotten=forgotten(*_before_and_after(kept)),
        overall=overall(*(_before_and_after(sets)[1] for sets in (tuned_for, kept))),
        downstream=tuned_for,
        upstream=kept,
    )


def _before_and_after(sets: dict[str, tuple[float, float]]) -> list[dict[str, float]]:
    return [{name: scores[column] for name, scores in sets.items()} for column in (0, 1)]


@check_kinds
def improvement(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    r"""Return E, the mean improvement over zero-shot on downstream sets.

    $E = \frac{1}{|D|} \sum_{d \in D} (a_d - z_d)$ with $a_d$ the score of the tuned model on set $d$ and $z_d$ that of
    the model before (arXiv 2503.04543, "specialization improvement").

    Args:
        before: Score of each downstream set before tuning.
        after: The same after tuning.

    Raises:
        ConfigError: If there are no sets, or not the same ones.

    Example:
        >>> improvement({"IconQA": 20, "PathVQA": 30}, {"IconQA": 80, "PathVQA": 60})
        45.0
    """
    if set(before) != set(after):
        raise ConfigError("Scores before and after are of other sets.", expected=sorted(before), got=sorted(after))
    return _mean({name: after[name] - before[name] for name in before})


@check_kinds
def forgotten(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    r"""Return F, the mean loss on upstream sets; negative where the model improved.

    $F = \frac{1}{|U|} \sum_{u \in U} (z_u - a_u)$ with $z_u$ the score of the model before tuning on set $u$ and $a_u$
    that of the tuned model (arXiv 2503.04543, "stabilization forgetting").

    Args:
        before: Score of each upstream set before tuning.
        after: The same after tuning.

    Raises:
        ConfigError: If there are no sets, or not the same ones.

    Example:
        >>> forgotten({"GQA": 62, "TextVQA": 58}, {"GQA": 58, "TextVQA": 52})
        5.0
    """
    return -improvement(before, after) + 0.0  # no minus before a zero


@check_kinds
def overall(downstream: Mapping[str, float], upstream: Mapping[str, float]) -> float:
    r"""Return O, the mean of what the tuned model scores on downstream and on upstream sets.

    $O = \frac{1}{2} \left( \frac{1}{|D|} \sum_{d \in D} a_d + \frac{1}{|U|} \sum_{u \in U} a_u \right)$
    (arXiv 2503.04543, "O-Average"): both sides count the same, however many sets each has.

    Args:
        downstream: Score of each downstream set after tuning.
        upstream: Score of each upstream set after tuning.

    Raises:
        ConfigError: If there is no downstream or no upstream set.

    Example:
        >>> overall({"IconQA": 80}, {"GQA": 58, "TextVQA": 52})
        67.5
    """
    return (_mean(downstream) + _mean(upstream)) / 2


def _mean(scores: Mapping[str, float]) -> float:
    if not scores:
        raise ConfigError("No scores have no mean.", expected="at least one set", got="none")
    return fmean(scores.values())
