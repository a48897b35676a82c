"""How the size of a run was found: full tuning against a frozen tower on validation scenes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from study.results.contrasts import Estimate, difference, mean
from study.results.formats import Table, interval, number, plural
from study.results.load import Group, Row, read_rows
from study.results.studies import TWELVE
from study.runs.settings import RunSettings

SEARCH = Path(__file__).parent / "search"
FIELDS = ("steps", "batch", "tokens")
WANTED = 4.0  # points, of full over frozen


def size_rows(folder: Path = SEARCH) -> list[Row]:
    """Read the rows of the search for a size, and of the search for rates at the size that was chosen."""
    return [*read_rows(folder), *read_rows(folder / "size")]


def size_table(rows: Iterable[Row]) -> Table:
    """Tabulate full tuning, at its best rate, against a frozen tower: a line for each size that has both.

    Args:
        rows: Rows on validation scenes; those of other methods, or of another tower, are left out.
    """
    tower = RunSettings().tower
    found: dict[tuple[int, ...], dict[str, list[Row]]] = {}
    for row in rows:
        own = row.settings.get("tower", tower) == tower
        if own and row.split == "validation" and row.settings["method"] in ("frozen", "full"):
            size = tuple(row.settings[name] for name in FIELDS)
            found.setdefault(size, {}).setdefault(row.settings["method"], []).append(row)
    table = Table("Sizes that were tried", ["steps", "questions per step", "tokens", "frozen", "full", "full − frozen"])
    table.text = frozenset()
    chosen = tuple(getattr(RunSettings(), name) for name in FIELDS)
    for size, methods in sorted(found.items()):
        if len(methods) < 2:
            continue
        full = max(by_rate(methods["full"]).values(), key=mean_of)
        frozen = Group("frozen", {row.seed: row for row in methods["frozen"] if row.seed in full.rows})
        if not frozen.rows:
            continue
        if size == chosen:
            table.strong = {(len(table.rows), x) for x in range(len(table.header))}
            table.notes = [_note(difference(full, frozen, TWELVE))]
        means = [number(mean_of(frozen)), number(mean_of(full))]
        table.rows.append([*map(str, size), *means, interval(difference(full, frozen, TWELVE))])
    return table


def by_rate(rows: Iterable[Row]) -> dict[float, Group]:
    """Group rows of one method by the tower's learning rate, from low to high."""
    rates: dict[float, dict[int, Row]] = {}
    for row in rows:
        rates.setdefault(row.settings["vision_lr"], {})[row.seed] = row
    return {rate: Group(f"{rate:g}", own) for rate, own in sorted(rates.items())}


def mean_of(group: Group) -> float:
    """Return the mean of the twelve tasks."""
    found = mean(group, TWELVE)
    assert found is not None
    return found.value


def _note(found: Estimate | None) -> str:
    if found is None:
        return ""
    reached = found.value >= WANTED and found.sign > 0
    return (
        f"In bold is the size of the study. It was to separate full tuning from a frozen tower by {WANTED:.0f} points, "
        f"with an interval that excludes 0: {'it does' if reached else 'it does not'} ({plural(found.seeds, 'seed')})."
    )
