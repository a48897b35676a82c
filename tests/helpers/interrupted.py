"""Processes that are interrupted while they write files."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covft.errors import CheckpointError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
DONE, REFUSED, OTHER = 0, 1, 2
# What Python reports before it does it; the rest is patched below.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.chmod", "os.listdir", "os.scandir", "fcntl.flock")


def fork(action: Callable[[], Any]) -> int:
    """Run an action in a forked process, and return its id; it ends within a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        pid = os.fork()
    if pid:
        return pid
    code = OTHER
    try:
        signal.alarm(60)
        action()
        code = DONE
    except CheckpointError:
        code = REFUSED
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """Wait for a process; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def interrupted(action: Callable[[], Any], folder: Path, step: int, *, kill: bool) -> int | None:
    """Run an action whose n-th file operation in a folder fails, or kills the process.

    Args:
        action: What writes files.
        folder: Where.
        step: Number of the operation, from 1.
        kill: SIGKILL instead of an error.

    Returns:
        The exit code; None if there are fewer operations.
    """
    reached, told = os.pipe()

    def run() -> None:
        _arm(folder, step, told, kill=kill)
        action()

    code = end_of(fork(run))
    os.close(told)
    with os.fdopen(reached, "rb") as pipe:
        return code if pipe.read() else None


def _arm(folder: Path, step: int, told: int, *, kill: bool) -> None:
    from covft.utils import files

    count = 0

    def operation() -> None:
        nonlocal count
        count += 1
        if count == step:
            os.write(told, b"!")
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    def hook(event: str, args: Any) -> None:
        if event in EVENTS and (event == "fcntl.flock" or str(folder) in str(args[0])):
            operation()

    fsync, save_file = os.fsync, files.save_file

    def counted_fsync(handle: int) -> None:
        operation()
        fsync(handle)

    def counted_save(tensors: Any, path: Path, about: Any) -> None:
        save_file(tensors, path, about)
        content = path.read_bytes()
        path.write_bytes(content[:-20])  # in between, all but the end is written
        operation()
        path.write_bytes(content)

    os.fsync, files.save_file = counted_fsync, counted_save  # type: ignore[assignment]
    sys.addaudithook(hook)
