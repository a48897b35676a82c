"""Divides numbered rows among processes that may die: claimed by shard, written aside and renamed.

The folder holds `shards.json` (what is divided), a file per finished shard, and `claims/`. A claim is a file that only
one process can create: `claims/00007.1` is the first of shard 7. If its process is dead, another one creates
`claims/00007.2`, which again only one can. If a process that was taken for dead goes on, both write the same shard, and
one file is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covft.errors import CheckpointError, ConfigError

PLAN, CLAIMS = "shards.json", "claims"
_WAIT = 1.0  # seconds between looks at the shards that others have


@dataclass(frozen=True)
class Shard:
    """Rows that this process has claimed.

    Attributes:
        number: Which shard.
        rows: Its rows.
        path: Its file, once it is finished.
        claim: The file by which this process holds it.
    """

    number: int
    rows: range
    path: Path
    claim: Path = field(repr=False)

    def beat(self) -> None:
        """Say that this process is alive; call it now and then while a shard is computed."""
        with contextlib.suppress(OSError):
            os.utime(self.claim)

    def write(self, write: Callable[[Path], Any]) -> None:
        """Write the shard's file: aside, then renamed.

        Args:
            write: Writes a file; called with its path.

        Raises:
            CheckpointError: If it cannot be written.
        """
        aside = self.path.with_name(f".{self.path.stem}-{self.claim.suffix[1:]}-{os.getpid()}{self.path.suffix}")
        try:
            write(aside)
            with aside.open("r+b") as file:
                os.fsync(file.fileno())
            aside.replace(self.path)
        except OSError as error:
            if self.path.exists():  # another process, which took this one for dead, was first and has tidied up
                return
            raise CheckpointError(
                f"{self.path} cannot be written.",
                expected="a folder with free space, which this user may write to",
                got=f"{type(error).__name__}: {error}",
            ) from error
        finally:
            aside.unlink(missing_ok=True)


class Shards:
    """Shards of numbered rows, which any number of processes on any number of machines work on.

    Each finished shard is one file in the folder, `shard-00007.parquet`. A process that dies loses the shard that it is
    at, no more: another one takes it over, or the next start does.

    Args:
        folder: A folder that all processes see; made if needed.
        rows: Number of rows.
        size: Rows per shard.
        suffix: Suffix of the files.
        about: What the output depends on, as JSON. A folder that was begun with another is refused.
        stale_after: Seconds without a `Shard.beat` after which a process on another machine counts as dead. On the same
            machine, that it is gone is seen at once.

    Raises:
        ConfigError: If the folder was begun for other rows, or with another `about`.
        CheckpointError: If the folder cannot be written to.

    Example:
        >>> from tempfile import mkdtemp
        >>> for shard in Shards(mkdtemp(), rows=5, size=2, suffix=".txt"):
        ...     shard.write(lambda path: path.write_text(str(list(shard.rows))))
        ...     print(shard.path.name, shard.path.read_text())
        shard-00000.txt [0, 1]
        shard-00001.txt [2, 3]
        shard-00002.txt [4]
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        rows: int,
        size: int,
        *,
        suffix: str = ".parquet",
        about: Mapping[str, Any] | None = None,
        stale_after: float = 600.0,
    ) -> None:
        # Without check_kinds, which imports torch: a process that finds nothing to do should see so at once.
        if rows < 1 or size < 1 or stale_after <= 0:
            raise ConfigError(
                "Rows cannot be divided like this.",
                expected="rows >= 1, size >= 1, stale_after > 0",
                got=f"rows={rows}, size={size}, stale_after={stale_after}",
            )
        self.folder, self.rows, self.size, self.suffix = Path(folder), rows, size, suffix
        self.stale_after = stale_after
        self._claims = self.folder / CLAIMS
        self._begin({"format": 1, "rows": rows, "size": size, "suffix": suffix, "about": dict(about or {})})

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"shard-{number:05d}{self.suffix}"

    def missing(self) -> list[int]:
        """Return the shards that are not finished."""
        found = {entry.name for entry in os.scandir(self.folder)}
        return [number for number in range(len(self)) if self.path(number).name not in found]

    def __iter__(self) -> Iterator[Shard]:
        """Claim one shard after another until all are finished; wait for those that others are at.

        Yields:
            A shard of this process. One that it leaves without `Shard.write` is free again.
        """
        while to_do := self.missing():
            latest, claimed = self._latest_claims(), False
            for number in to_do:
                claim = self._claim(number, latest.get(number, 0))
                if claim is None:
                    continue
                claimed = True
                try:
                    rows = range(number * self.size, min((number + 1) * self.size, self.rows))
                    yield Shard(number, rows, self.path(number), claim)
                finally:
                    claim.unlink(missing_ok=True)
            if not claimed:
                time.sleep(_WAIT)
        for left in self._claims.iterdir():  # of dead processes
            left.unlink(missing_ok=True)
        for left in self.folder.glob(f".shard-*{self.suffix}"):
            left.unlink(missing_ok=True)

    def _begin(self, plan: dict[str, Any]) -> None:
        """Write what is divided, or compare it with what is written."""
        path = self.folder / PLAN
        plan = json.loads(json.dumps(plan))
        try:
            self._claims.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                aside = path.with_name(f".{PLAN}-{os.getpid()}")
                aside.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
                aside.replace(path)  # another process that begins now writes the same
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder} cannot be used.",
                expected=f"a folder that this user may write to, new or with a {PLAN}",
                got=f"{type(error).__name__}: {error}",
            ) from error
        if found != plan:
            raise ConfigError(
                f"{self.folder} was begun with other data or settings.",
                expected=_differences(found, plan),
                got=_differences(plan, found),
                fix="another folder, or the same data and settings",
            )

    def _latest_claims(self) -> dict[int, int]:
        """Return the number of the latest claim of each shard that has one."""
        found: dict[int, int] = {}
        for entry in os.scandir(self._claims):
            number, _, count = entry.name.partition(".")
            if number.isdigit() and count.isdigit():
                found[int(number)] = max(found.get(int(number), 0), int(count))
        return found

    def _claim(self, number: int, latest: int) -> Path | None:
        """Create the next claim of a shard; return None if it is finished, or another process has it."""
        if latest and self._is_held(self._claims / f"{number:05d}.{latest}"):
            return None
        claim = self._claims / f"{number:05d}.{latest + 1}"
        me = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
        try:
            with claim.open("x", encoding="utf-8") as file:
                json.dump(me, file)
        except FileExistsError:
            return None
        if self.path(number).exists():  # it was finished in between
            claim.unlink(missing_ok=True)
            return None
        return claim

    def _is_held(self, claim: Path) -> bool:
        """Return whether the process of a claim is alive, as far as can be known."""
        try:
            age = time.time() - claim.stat().st_mtime
            holder = json.loads(claim.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return True  # it has just finished, or given up: look again
        except ValueError:
            holder = {}  # it is just being written, or its process was killed then
        gone = holder.get("machine") == _machine() and _is_gone(holder)
        return not gone and age < self.stale_after


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Show the values of one plan that differ in another."""
    flat = [{**plan, **plan.get("about", {})} for plan in (one, other)]
    names = [name for name in flat[0] if name != "about" and flat[0][name] != flat[1].get(name)]
    return ", ".join(f"{name}={flat[0][name]!r}" for name in names) or "no such setting"


def _machine() -> str:
    """Return a name for this machine since it was started, and for its numbers of processes, which containers have."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _is_gone(holder: Mapping[str, Any]) -> bool:
    """Return whether a process of this machine has ended; another one of the same number does not count."""
    if os.name == "nt":  # where signal 0 is Ctrl+C
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(holder["pid"]) != holder["started"]


def _started(pid: int) -> str | None:
    """Return when a process was started; None where the system does not say, or it has ended and is not yet reaped."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state == "Z" else fields[18]
