"""What tuning improved and what it forgot, from the result files of a model before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from covft.errors import EvaluationError
from covft.integrations.evaluation.benchmarks import DOWNSTREAM, UPSTREAM, entries_of
from covft.integrations.evaluation.scores import read_scores
from covft.metrics import ForgettingReport, forgetting
from covft.utils.arguments import check_kinds


@dataclass(frozen=True)
class ForgettingTable:
    """E, F and O over the sets that both folders have.

    Attributes:
        report: The numbers.
        engine: Which engine wrote the scores.
        missing: Why a set does not count, by set.
        partial: Questions asked and questions there are, by set, where `--limit` cut them.
    """

    report: ForgettingReport
    engine: str
    missing: Mapping[str, str]
    partial: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        """Return the table for a terminal, with notes."""
        entries, counted = entries_of(self.engine), [*self.report.upstream, *self.report.downstream]
        notes = [f"left out  {name}: {reason}" for name, reason in self.missing.items()]
        notes += [f"partial   {name}: {asked} of {there} questions" for name, (asked, there) in self.partial.items()]
        notes += [f"asked     {name}: {entries[name].note}" for name in counted if entries[name].note]
        sets = len(UPSTREAM) + len(DOWNSTREAM)
        counts = f"{len(counted)} of {sets} sets; E, F and O are comparable only over the same sets"
        return "\n".join([str(self.report), "", f"engine    {self.engine}; {counts}", *notes])


@check_kinds
def forgetting_table(before: str | Path, after: str | Path, *, engine: str | None = None) -> ForgettingTable:
    """Report E, F and O from an engine's result files.

    Downstream sets are ScienceQA, IconQA, RSVQA, PathVQA and Flickr30k, upstream ones OKVQA, GQA, TextVQA, OCRVQA, COCO
    captions and MME. Neither engine has all; sets without a score in both folders are left out and named.

    Args:
        before: Results of the model before it was tuned, a folder as for `read_scores`.
        after: Results of the tuned model.
        engine: `"lmms-eval"` or `"vlmevalkit"`; None finds out.

    Raises:
        EvaluationError: As for `read_scores`; if the engines differ; or if no downstream or no upstream set is left.
    """
    sets = (*UPSTREAM, *DOWNSTREAM)
    old, new = (read_scores(folder, sets, engine=engine) for folder in (before, after))
    if old.engine != new.engine:
        raise EvaluationError(
            "The engines ask in different words, so their scores cannot be compared.",
            expected="results of one engine",
            got=f"{old.engine} before and {new.engine} after",
            fix="evaluate both models with one engine",
        )
    missing = {
        name: "; ".join(f"{when}: {one.missing[name]}" for when, one in both if name in one.missing)
        for both in [(("before", old), ("after", new))]
        for name in sets
        if name not in old.values or name not in new.values
    }
    downstream, upstream = ([name for name in side if name not in missing] for side in (DOWNSTREAM, UPSTREAM))
    if not downstream or not upstream:
        raise EvaluationError(
            f"There is no {'upstream' if downstream else 'downstream'} set with a score before and after.",
            expected=f"one or more of {', '.join(UPSTREAM if downstream else DOWNSTREAM)}",
            got="; ".join(f"{name}: {reason}" for name, reason in list(missing.items())[:6]),
            fix="covft evaluate FOLDER --tasks forgetting",
        )
    partial = {name: count for one in (old, new) for name, count in one.partial.items() if name not in missing}
    report = forgetting(old.values, new.values, downstream=downstream, upstream=upstream)
    return ForgettingTable(report, old.engine, missing, partial)
