"""How learning rates of the tower were found: the same search for every method, on validation scenes."""

from __future__ import annotations

from collections.abc import Iterable

from study.results.formats import NOTHING, Table, number
from study.results.load import Row
from study.results.size import FIELDS, by_rate, mean_of
from study.runs.settings import RunSettings


def rates_table(rows: Iterable[Row]) -> Table:
    """Tabulate the mean of the twelve tasks by the tower's learning rate: a line for what was tried at several.

    Args:
        rows: Rows on validation scenes; those of another size of a run are left out.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        settings = RunSettings.from_dict(row.settings)
        usual = RunSettings(size=settings.size)
        if row.split != "validation" or settings.vision_lr is None:
            continue
        if all(getattr(settings, name) == getattr(usual, name) for name in FIELDS):
            found.setdefault(settings.of_method().label, []).append(row)
    means = {label: {rate: mean_of(group) for rate, group in by_rate(own).items()} for label, own in found.items()}
    means = {label: own for label, own in sorted(means.items()) if len(own) > 1}
    rates = sorted({rate for own in means.values() for rate in own})
    table = Table("Learning rates that were tried", ["", *(f"{rate:g}" for rate in rates)])
    ends: dict[str, list[str]] = {"lowest": [], "highest": []}
    for label, own in means.items():
        best = max(own, key=lambda rate: own[rate])
        table.strong.add((len(table.rows), 1 + rates.index(best)))
        table.rows.append([label, *(number(own[rate]) if rate in own else NOTHING for rate in rates)])
        for end, rate in (("lowest", min(own)), ("highest", max(own))):
            if best == rate:
                ends[end].append(label)
    for end, labels in ends.items():
        if labels:
            named = "; ".join(labels)
            table.notes.append(f"Best at the {end} rate that was tried, so one beyond may suit better: {named}.")
    return table
