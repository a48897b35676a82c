"""Reports unusable rows, counts them, and raises an error past a limit."""

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

_LONGEST_REASON = 2000


@dataclass(frozen=True)
class Place:
    """The place of a row in a file.

    Attributes:
        file: The annotation file.
        row: Index of the row in its file, from 0.
        line: Number of the line, from 1, if the file has one row per line.
    """

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" + ("" if self.line is None else f" (line {self.line})")


class DataError(CoVFTError, ValueError):
    """An unusable file or row of training data.

    Args:
        problem: The reason.
        place: The place of the row, which starts the message.
        **rows: `expected`, `got`, `known` and `fix` of `CoVFTError`.
    """

    def __init__(self, problem: str, *, place: Place | None = None, **rows: Any) -> None:
        self.reason = problem
        self.place = place
        super().__init__(f"{place}: {problem}" if place else problem, **rows)

    def at(self, place: Place) -> DataError:
        """Copy the error with a place; an error that has one keeps it."""
        if self.place is not None:
            return self
        rows = {"expected": self.expected, "got": self.got, "known": self.known, "fix": self.fix}
        return DataError(self.reason, place=place, **rows)


@dataclass(frozen=True)
class BrokenRow:
    """A skipped row.

    Attributes:
        file: The annotation file.
        row: Index of the row in its file, from 0.
        line: Number of the line, from 1, or None if rows are not lines.
        reason: The reason.
    """

    file: str
    row: int
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{Place(self.file, self.row, self.line)}: {self.reason}"


class BrokenLog:
    """Logs the broken rows of a data set across processes.

    The workers of a DataLoader are processes with copies of the data set. They share this log through a small temporary
    file, which is created with the first broken row and deleted with the log that created it.

    Args:
        rows: Number of rows in the data set.
        max_broken: Limit of broken rows: a number, or a fraction of all rows, rounded down.

    Raises:
        ConfigError: If `max_broken` is negative, a fraction above 1, or not a number.
    """

    def __init__(self, rows: int, max_broken: int | float) -> None:
        is_number = isinstance(max_broken, (int, float)) and not isinstance(max_broken, bool)
        if not is_number or not 0 <= max_broken or (isinstance(max_broken, float) and max_broken > 1):
            raise ConfigError(
                f"max_broken={max_broken!r} is not a limit of broken rows.",
                expected="a number of rows (an int >= 0) or a fraction of them (a float in [0, 1])",
                got=repr(max_broken),
                fix="max_broken=0.01",
            )
        self.rows = rows
        self.max_broken = max_broken
        self.limit = max_broken if isinstance(max_broken, int) else int(max_broken * rows)
        self._known: dict[tuple[str, int], BrokenRow] = {}
        self._read = 0  # bytes of the file
        self._path = Path(tempfile.gettempdir()) / f"covft-broken-{uuid.uuid4().hex}.jsonl"
        weakref.finalize(self, _remove, self._path, os.getpid())

    def entries(self) -> tuple[BrokenRow, ...]:
        """List the broken rows that any process has met so far, each once, in order."""
        self._read_on()
        return tuple(self._known.values())

    def add(self, error: DataError) -> None:
        """Report a broken row with a warning, once.

        Args:
            error: Its error, with the place.

        Raises:
            DataError: If more rows are broken than the limit allows; the message names the first of them.
        """
        assert error.place is not None
        entry = BrokenRow(error.place.file, error.place.row, error.place.line, error.reason[:_LONGEST_REASON])
        self._read_on()
        if (entry.file, entry.row) not in self._known:
            # A single write in append mode: lines of several workers do not mix.
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, (json.dumps(asdict(entry)) + "\n").encode())
            finally:
                os.close(handle)
            warnings.warn(f"Skipped a broken row and took the next usable one. {entry}", UserWarning, stacklevel=3)
            self._read_on()
        if len(self._known) > self.limit:
            raise self._too_many(self.entries()) from error

    def _read_on(self) -> None:
        """Read what processes have written since the last time, so that each line is read once."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            self._known, self._read = {}, 0
            return
        for line in lines:
            if line.endswith(b"\n"):
                entry = BrokenRow(**json.loads(line))
                self._known.setdefault((entry.file, entry.row), entry)
                self._read += len(line)

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
    # A forked worker that drops its copy must not delete the file.
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
