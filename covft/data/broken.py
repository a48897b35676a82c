"""Rows that cannot be used: how they are named, counted and, past a limit, refused."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
import warnings
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from covft.errors import ConfigError, CoVFTError


@dataclass(frozen=True)
class Place:
    """Where a row stands.

    Attributes:
        file: The annotation file.
        row: Number of the row in its file, from 0.
        line: Number of the line, from 1, where the file has a row per line.
    """

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" + ("" if self.line is None else f" (line {self.line})")


class DataError(CoVFTError, ValueError):
    """A file or a row of training data that cannot be used.

    Args:
        problem: What is wrong with it.
        place: Where it stands; it comes first in the message.
        **rows: `expected`, `got`, `known` and `fix` of `CoVFTError`.
    """

    def __init__(self, problem: str, *, place: Place | None = None, **rows: Any) -> None:
        self.reason = problem
        self.place = place
        super().__init__(f"{place}: {problem}" if place else problem, **rows)

    def at(self, place: Place) -> DataError:
        """The same error with its place; one that has a place keeps it."""
        if self.place is not None:
            return self
        rows = {"expected": self.expected, "got": self.got, "known": self.known, "fix": self.fix}
        return DataError(self.reason, place=place, **rows)


@dataclass(frozen=True)
class BrokenRow:
    """A row that was left out.

    Attributes:
        file: The annotation file.
        row: Number of the row in its file, from 0.
        line: Number of the line, from 1, or None where rows are not lines.
        reason: What is wrong with it.
    """

    file: str
    row: int
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{Place(self.file, self.row, self.line)}: {self.reason}"


class BrokenLog:
    """The broken rows of a data set, over all processes that read it.

    The workers of a DataLoader are processes with copies of the data set. They share this log through a small file
    in the temporary folder, which appears with the first broken row and goes with the log that made it.

    Args:
        rows: Number of rows in the data set.
        max_broken: How many may be broken: a number of rows, or a fraction of all rows, rounded down.

    Raises:
        ConfigError: If `max_broken` is negative, a fraction above 1, or no number.
    """

    def __init__(self, rows: int, max_broken: int | float) -> None:
        is_number = isinstance(max_broken, (int, float)) and not isinstance(max_broken, bool)
        if not is_number or not 0 <= max_broken or (isinstance(max_broken, float) and max_broken > 1):
            raise ConfigError(
                f"max_broken={max_broken!r} cannot be used.",
                expected="a number of rows (an int >= 0) or a fraction of them (a float in [0, 1])",
                got=repr(max_broken),
                fix="max_broken=0.01",
            )
        self.rows = rows
        self.max_broken = max_broken
        self.limit = max_broken if isinstance(max_broken, int) else int(max_broken * rows)
        self._path = Path(tempfile.gettempdir()) / f"covft-broken-{uuid.uuid4().hex}.jsonl"
        weakref.finalize(self, _remove, self._path, os.getpid())

    def entries(self) -> tuple[BrokenRow, ...]:
        """The broken rows met so far by all processes, each once, in the order of their first meeting."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return ()
        found: dict[tuple[str, int], BrokenRow] = {}
        for line in lines:
            entry = BrokenRow(**json.loads(line))
            found.setdefault((entry.file, entry.row), entry)
        return tuple(found.values())

    def add(self, error: DataError) -> None:
        """Report a broken row: once as a warning, and as an error when there are too many.

        Args:
            error: What is wrong with the row; it must have its place.

        Raises:
            DataError: If more rows are broken than the limit allows; the first of them are named.
        """
        assert error.place is not None
        entry = BrokenRow(error.place.file, error.place.row, error.place.line, error.reason)
        before = self.entries()
        if all((entry.file, entry.row) != (known.file, known.row) for known in before):
            # One write to a file opened for appending: workers do not cut into each other's lines.
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, (json.dumps(asdict(entry)) + "\n").encode())
            finally:
                os.close(handle)
            warnings.warn(f"Another row stands in for one that is broken. {entry}", UserWarning, stacklevel=3)
        broken = self.entries()
        if len(broken) > self.limit:
            raise self._too_many(broken) from error

    def _too_many(self, broken: tuple[BrokenRow, ...]) -> DataError:
        first = "\n            ".join(str(entry) for entry in broken[:5])
        more = f"\n            and {len(broken) - 5} more" if len(broken) > 5 else ""
        return DataError(
            f"{len(broken)} of {self.rows} rows are broken, more than max_broken={self.max_broken!r} allows.",
            expected=f"at most {self.limit}",
            got=first + more,
            fix="repair or remove these rows, or raise max_broken",
        )


def _remove(path: Path, owner: int) -> None:
    # A forked worker that drops its copy must not take the file from the others.
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
