"""Opens the files that users and annotations name: regular files of bounded size, nothing else."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from covft.data.broken import DataError
from covft.data.checks import short, shown
from covft.errors import ConfigError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# A pipe that replaces the file between `stat` and `open` must not block.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def check_path(value: Any, what: str) -> Path:
    """Check a path that the caller gives.

    Raises:
        ConfigError: If it is not a path.
        DataError: If it is a URL.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError(f"{what} is not given by a path.", expected="a string or a Path", got=short(value))
    check_not_url(text, what)
    return Path(text)


def check_not_url(name: str, what: str) -> None:
    """Refuse URLs and `data:` strings, which `Path` would change."""
    if _URL.match(name):
        raise DataError(f"{what} {shown(name)} is a URL; covft reads files only. Download it and name the file.")


def open_regular(path: Path, what: str) -> BinaryIO:
    """Open a regular file; folders, pipes, sockets and devices are not even opened.

    Raises:
        DataError: If it cannot be opened, with the reason.
    """
    where = f"{what} {shown(str(path))} cannot be read"
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            file = os.fdopen(os.open(path, _FLAGS), "rb")
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except (OSError, ValueError) as error:  # ValueError: a NUL or a surrogate in the name
        raise DataError(f"{where}: {getattr(error, 'strerror', None) or error}.") from error
    raise DataError(f"{where}: it is {_KINDS.get(stat.S_IFMT(mode), 'special')}, not a regular file.")


def read_regular(path: Path, what: str, max_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        DataError: If it cannot be read or has more than `max_bytes`.
    """
    with open_regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        check_size(size, f"{what} {shown(str(path))}", max_bytes)
        try:
            return file.read(size) or b""
        except OSError as error:
            raise DataError(f"{what} {shown(str(path))} cannot be read: {error.strerror or error}.") from error


def check_size(size: int, what: str, max_bytes: int) -> None:
    """Refuse what is larger than `max_bytes`."""
    if size > max_bytes:
        raise DataError(f"{what} has {size:,} bytes, more than the limit of {max_bytes:,}.")
