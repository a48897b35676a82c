"""Claims, and what the rows say about each.

A claim is one or more comparisons, each written so that a positive number is what is claimed. The verdict follows from
their intervals alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from study.results.contrasts import Estimate
from study.results.studies import Results

HOLDS, FAILS, UNKNOWN, NOT_RUN = "holds", "does not hold", "cannot be told at this size", "not run"


@dataclass(frozen=True)
class Comparison:
    """One comparison of a claim.

    Attributes:
        name: What is compared.
        found: The estimate, positive where it is as claimed; None if a run is missing.
    """

    name: str
    found: Estimate | None


Compare = Callable[[Results], list[Comparison]]


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        text: What is claimed.
        source: Table or figure of the paper.
        numbers: What the paper has, where it has a number.
        compare: Makes its comparisons from the results; none where the runs are missing.
        every: The study of which it is about every run; those without a row then are comparisons of unknown outcome.
    """

    text: str
    source: str
    numbers: str
    compare: Compare
    every: str = ""

    def comparisons(self, results: Results) -> list[Comparison]:
        """Return what there is to compare, and what there is not yet."""
        return [*self.compare(results), *(Comparison(label, None) for label in results.missing(self.every))]


def verdict(comparisons: list[Comparison]) -> str:
    """Return the verdict on a claim.

    It does not hold if any interval is on the other side of 0, and holds if all are on its side.
    """
    signs = [None if each.found is None else each.found.sign for each in comparisons]
    if -1 in signs:
        return FAILS
    if not signs or None in signs:
        return NOT_RUN
    return HOLDS if all(sign == 1 for sign in signs) else UNKNOWN
