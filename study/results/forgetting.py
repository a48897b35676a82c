"""Tuning against forgetting: E, F and O of the second paper, with intervals.

E is the mean improvement on downstream tasks, F the mean loss on upstream tasks, and O the mean of the downstream and
the upstream mean, as `covft.metrics.forgetting` defines them. Each is a weighted sum of means, so it has an interval.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from study.results import contrasts
from study.results.contrasts import Estimate, Term
from study.results.formats import Table, interval
from study.results.load import Group
from study.results.studies import Results, Study


@dataclass(frozen=True)
class Forgetting:
    """What tuning improved and what it lost.

    Attributes:
        improvement: E, over the model before it was tuned.
        forgotten: F; negative where the upstream tasks improved.
        overall: O.
    """

    improvement: Estimate | None
    forgotten: Estimate | None
    overall: Estimate | None


def sides(group: Group) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the downstream and the upstream tasks of a group, as far as they were scored."""
    upstream = contrasts.common(group.settings.get("upstream") or (), group)
    downstream = contrasts.common(group.settings.get("tasks") or (), group)
    return tuple(task for task in downstream if task not in upstream), upstream


def before(group: Group) -> Group | None:
    """Return the same runs before they were tuned; None if they were not scored then."""
    rows = {seed: replace(row, hits=row.before) for seed, row in group.rows.items() if row.before}
    return Group(f"{group.label}, before", rows) if len(rows) == len(group.rows) else None


def terms(group: Group) -> dict[str, list[Term]]:
    """Return E, F and O of a group as weighted sums."""
    downstream, upstream = sides(group)
    found: dict[str, list[Term]] = {}
    earlier = before(group)
    if downstream and upstream:
        found["O"] = [Term(0.5, group, downstream), Term(0.5, group, upstream)]
        if earlier is not None:
            found["E"] = [Term(1, group, downstream), Term(-1, earlier, downstream)]
            found["F"] = [Term(-1, group, upstream), Term(1, earlier, upstream)]
    return found


def forgetting_of(group: Group) -> Forgetting:
    """Estimate E, F and O of a group."""
    found = terms(group)
    return Forgetting(*(contrasts.contrast(found[name]) if name in found else None for name in "EFO"))


def compared(ours: Group, theirs: Group, name: str) -> Estimate | None:
    """Estimate the difference of E, F or O between two groups."""
    mine, other = terms(ours).get(name), terms(theirs).get(name)
    if mine is None or other is None:
        return None
    return contrasts.contrast([*mine, *(replace(term, weight=-term.weight) for term in other)])


def tuned(results: Results) -> list[Group]:
    """Return the groups of the study of forgetting that have both sides."""
    return [g for g in results.groups if "forgetting" in g.studies and all(sides(g))]


def forgetting_table(results: Results, study: Study) -> Table:
    """Tabulate E, F and O."""
    groups = tuned(results)
    if not groups:
        return Table(study.title, [""], notes=["Not run."])
    table = Table(
        study.title, ["", "trained", "seeds", "E: improvement downstream", "F: loss upstream", "O: mean of both"]
    )
    for group in groups:
        found = forgetting_of(group)
        signed = [interval(found.improvement), interval(found.forgotten), interval(found.overall, difference=False)]
        table.rows.append([group.label, f"{group.first.trained.get('all', 0):,}", str(len(group.rows)), *signed])
    downstream, upstream = sides(groups[0])
    table.notes.append(
        f"Downstream: {', '.join(downstream)}; upstream: {', '.join(upstream)}. "
        "Scores before tuning count as exact where a row has no answers of then."
    )
    return table
