"""Rows on file, one per finished run, and which process works on which run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from covft.errors import CheckpointError
from covft.utils.files import write_json
from study.runs.settings import RunSettings

RESULTS = Path(__file__).parents[1] / "results"
ROWS = RESULTS / "rows"


class Rows:
    """A folder of rows, `<name>.json`, that several processes may work on.

    A run is claimed by a lock file that only one process can create. It holds the process that did; the lock of a
    process that is gone does not count.

    Args:
        folder: The folder; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.locks = folder / ".locks"

    def write(self, row: dict[str, Any]) -> None:
        """Write a row: aside, then renamed."""
        write_json(self._path(row["name"]), row)

    def read(self) -> list[dict[str, Any]]:
        """Return all rows, by name.

        Raises:
            CheckpointError: If a file is not a row.
        """
        return [self._read(path) for path in sorted(self.folder.glob("*.json"))]

    def missing(self, runs: Iterable[RunSettings]) -> list[RunSettings]:
        """Return the runs that have no row yet, in their order, each once."""
        named = {run.name: run for run in runs}
        return [run for name, run in named.items() if not self._path(name).is_file()]

    def add_studies(self, name: str, studies: Iterable[str]) -> None:
        """Note in a finished row that it belongs to more studies."""
        row = self._read(self._path(name))
        known = list(dict.fromkeys([*row["studies"], *studies]))
        if known != row["studies"]:
            self.write({**row, "studies": known})

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claim a run for this process while open; yields False if it is finished or another process has it."""
        lock = self.locks / f"{name}.lock"
        claimed = self._take(name, lock)
        try:
            yield claimed
        finally:
            if claimed:
                lock.unlink(missing_ok=True)

    def _take(self, name: str, lock: Path) -> bool:
        self.locks.mkdir(parents=True, exist_ok=True)
        with _exclusive(self.locks / ".claims"):
            if self._path(name).is_file():
                return False
            if lock.exists():
                if _is_held(lock):
                    return False
                lock.unlink()
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            with os.fdopen(handle, "w") as file:
                json.dump({"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}, file)
        return True

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            row = json.loads(path.read_text())
            assert row["name"] == path.stem
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise CheckpointError(
                f"{path} is not a row of the study.", got=repr(error), fix="delete it, and run again"
            ) from error
        return row


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time decide who has a run, so that two never take over one stale lock."""
    import fcntl

    if not (ignore := path.with_name(".gitignore")).exists():
        ignore.write_text("*\n")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing releases it


def _is_held(lock: Path) -> bool:
    try:
        holder = json.loads(lock.read_text())
    except ValueError:
        return False  # its process was killed while it wrote
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(holder["pid"]) == holder["started"]


def _started(pid: int) -> str | None:
    """Return when a process was started, so that another one of the same number is told apart; None if not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
