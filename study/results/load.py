"""Rows of the study, read and grouped.

A row is one run: a method, its settings, one seed. Runs that differ only in the seed share a label and form a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from covft.errors import CoVFTError

_SHARED = ("size", "held_out_questions")  # settings that decide which questions are held out


class RowsError(CoVFTError, ValueError):
    """Rows that cannot be read, or that do not belong together."""


@dataclass(frozen=True, eq=False)
class Row:
    """One run.

    Attributes:
        name: Name of the run, unique among the rows of a size.
        label: What tables call it; the same for every seed.
        studies: Names of the studies that it belongs to.
        settings: Every setting of the run.
        seed: Seed of the projector, the method's weights and the order of the data.
        split: Split of the held-out scenes.
        scores: Percent per task.
        hits: Per task, the score of every held-out question, between 0 and 1 (a CIDEr may be above 1).
        floors: Scores without the image and without the question, by name; empty in most rows.
        trained: Number of trained parameters, of the tower and of all.
        losses: Means of equal parts of training.
        seconds: Wall time of each part.
        device: What it ran on.
        versions: Versions of the libraries.
        date: When it ran.
        before: As `hits`, of the same run before it was tuned; only of runs that are tuned twice. Where the file has
            only a score, every question has it.
        more: Other fields of the file.
    """

    name: str
    label: str
    studies: tuple[str, ...]
    settings: dict[str, Any]
    seed: int
    split: str
    scores: dict[str, float]
    hits: dict[str, np.ndarray]
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    before: dict[str, np.ndarray] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)  # compared by identity
class Group:
    """Runs that differ only in the seed.

    Attributes:
        label: What tables call them.
        rows: The runs, by seed.
    """

    label: str
    rows: dict[int, Row]

    @property
    def first(self) -> Row:
        """The run of the lowest seed."""
        return self.rows[min(self.rows)]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that all its runs share."""
        return {key: value for key, value in self.first.settings.items() if key != "seed"}

    @property
    def studies(self) -> set[str]:
        """Studies that any of its runs belongs to."""
        return {study for row in self.rows.values() for study in row.studies}

    @property
    def tasks(self) -> list[str]:
        """Tasks that all its runs were scored on."""
        return [task for task in self.first.hits if all(task in row.hits for row in self.rows.values())]

    def score(self, task: str) -> float:
        """Return the mean over the seeds of a task's score."""
        return float(np.mean([row.scores[task] for row in self.rows.values()]))


def read_rows(folder: Path) -> list[Row]:
    """Read all rows of a folder, in the order of their file names; an absent folder has none.

    Raises:
        RowsError: If a file is not a row.
    """
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def groups_of(rows: Iterable[Row], split: str = "test") -> list[Group]:
    """Group the rows of a split by label, in the order in which labels first appear.

    Raises:
        RowsError: If a label has two runs with one seed or runs with other settings, or if two rows answered other
            questions, so that they cannot be paired.
    """
    kept = [row for row in rows if row.split == split]
    _same_questions(kept)
    found: dict[str, dict[int, Row]] = {}
    for row in kept:
        seeds = found.setdefault(row.label, {})
        if row.seed in seeds:
            raise RowsError(
                f"two rows are called {row.label!r} and have seed {row.seed}.",
                expected="one row per label and seed",
                got=f"{seeds[row.seed].name}, {row.name}",
                fix="give runs that differ in more than the seed labels that differ",
            )
        seeds[row.seed] = row
    groups = [Group(label, dict(sorted(seeds.items()))) for label, seeds in found.items()]
    for group in groups:
        _same_settings(group)
    return groups


def _read(path: Path) -> Row:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = {name: value for name, value in record.items() if name in Row.__dataclass_fields__}
        own = {
            "hits": {task: _hits(values) for task, values in record["hits"].items()},
            "before": {
                task: _earlier(values, record["hits"][task])
                for task, values in record.get("before", {}).items()
                if task in record["hits"]
            },
            "studies": tuple(record["studies"]),
            "losses": tuple(record["losses"]),
            "more": {name: value for name, value in record.items() if name not in known},
        }
        row = Row(**{**known, **own})
        _scores_are_those_of_hits(row)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RowsError(
            f"{path.name} is not a row of the study.",
            expected="one JSON object with the fields of study.results.load.Row",
            got=f"{type(error).__name__}: {error}",
            fix=f"rm {path}  # then run it again: python -m study run",
        ) from error
    return row


def _hits(values: str | list[float]) -> np.ndarray:
    found = np.array([int(v) for v in values] if isinstance(values, str) else values, dtype=float)
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise ValueError("hits are one finite number per question")
    return found


def _earlier(values: float | str | list[float], later: str | list[float]) -> np.ndarray:
    return np.full(len(later), values / 100) if isinstance(values, int | float) else _hits(values)


def _scores_are_those_of_hits(row: Row) -> None:
    for task, hits in row.hits.items():
        if abs(row.scores[task] - 100 * hits.mean()) > 0.051:  # scores may be rounded to one decimal
            raise ValueError(f"{task} has score {row.scores[task]}, and its hits have the mean {100 * hits.mean():.2f}")


def _same_questions(rows: list[Row]) -> None:
    """Raise unless all rows answered the same questions, as far as they answered the same tasks."""
    seen: dict[tuple[str, str], tuple[Any, Row]] = {}
    for row in rows:
        counts = {("questions of", task): len(hits) for task, hits in row.hits.items()}
        shared = {("setting", key): row.settings[key] for key in _SHARED if key in row.settings}
        for key, value in {**counts, **shared}.items():
            first, other = seen.setdefault(key, (value, row))
            if value != first:
                raise RowsError(
                    f"{row.name} and {other.name} did not answer the same questions, so they cannot be paired.",
                    expected=f"{' '.join(key)}: {first}",
                    got=value,
                    fix="keep rows of other questions in another folder: study/results/rows/<size>",
                )


def _same_settings(group: Group) -> None:
    rows = list(group.rows.values())
    for row in rows[1:]:
        keys = {*rows[0].settings} & {*row.settings} - {"seed"}  # an older row lacks settings that came later
        different = sorted(key for key in keys if rows[0].settings[key] != row.settings[key])
        if different:
            raise RowsError(
                f"{rows[0].name} and {row.name} share the label {group.label!r} and differ in more than the seed.",
                expected=", ".join(f"{key}={rows[0].settings.get(key)!r}" for key in different),
                got=", ".join(f"{key}={row.settings.get(key)!r}" for key in different),
                fix="give them labels that differ",
            )
