"""Reads single records of JSON lists and JSONL files of any size."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from covft.data.broken import DataError, Place
from covft.errors import ConfigError

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonRecords:
    """Reads the records of a JSON list or a JSONL file by index.

    Only the offsets of the records stay in memory (16 bytes per record; JSONL 24), so that the workers of a DataLoader
    stay small. No file stays open. A JSON list is parsed once to locate its records.

    Args:
        path: The file. Its first character, not its name, tells the format.

    Raises:
        DataError: If the file is missing, empty, or neither a JSON list nor JSONL.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                head = file.read(1 << 12).removeprefix(_BOM).lstrip()
        except OSError as error:
            raise DataError(f"The annotation file {self.path} cannot be read.", got=str(error)) from error
        self._size = self.path.stat().st_size
        self._lines: np.ndarray | None = None
        if head.startswith(b"["):
            self._starts, self._ends = _index_list(self.path)
        else:
            if head[:1] != b"{" or re.match(rb"\{[ \t]*\r?\n", head):
                raise DataError(
                    f"{self.path} is not a file of rows.",
                    expected="a JSON list of objects, or JSONL: one object per line",
                    got="an empty file" if not head else f"a file that starts with {head[:20]!r}",
                )
            self._starts, self._ends, self._lines = _index_lines(self.path)
        if not len(self):
            raise DataError(f"{self.path} has no rows.", got="an empty list")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Any:
        """Read one record.

        Raises:
            DataError: If it is not JSON.
            ConfigError: If the size of the file has changed.
        """
        with self._open() as file:
            return self._read(file, row)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Iterate over indices and records; records that are not JSON are skipped."""
        with self._open() as file:
            for row in range(len(self)):
                try:
                    yield row, self._read(file, row)
                except DataError:
                    continue

    def place(self, row: int) -> Place:
        """Locate a record by file, index and line."""
        return Place(str(self.path), row, None if self._lines is None else int(self._lines[row]))

    def _open(self) -> BinaryIO:
        file = self.path.open("rb")
        if os.fstat(file.fileno()).st_size != self._size:
            file.close()
            raise ConfigError(
                f"{self.path} has changed since its records were located.",
                expected=f"{self._size:,} bytes",
                got=f"{self.path.stat().st_size:,} bytes",
                fix="rebuild the data set",
            )
        return file

    def _read(self, file: BinaryIO, row: int) -> Any:
        start, end = int(self._starts[row]), int(self._ends[row])
        file.seek(start)
        try:
            return json.loads(file.read(end - start))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise DataError(f"The row is not JSON: {error}.", place=self.place(row)) from error


def _index_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts, ends, numbers, offset = [], [], [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                starts.append(offset)
                ends.append(offset + len(line))
                numbers.append(number)
            offset += len(line)
    return np.array(starts, np.int64), np.array(ends, np.int64), np.array(numbers, np.int64)


def _index_list(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = path.read_bytes()
    offset = len(_BOM) if data.startswith(_BOM) else 0
    try:
        text = data[offset:].decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8.", got=str(error)) from error
    del data
    starts, ends = [], []
    decoder = json.JSONDecoder()
    # `at` counts characters and `offset` bytes; all characters between records have one byte.
    at = _skip(text, 0)
    offset += at + 1
    at += 1  # the opening bracket
    try:
        while True:
            here = _skip(text, at)
            if text[here : here + 1] == "]" and not starts:
                break
            _, end = decoder.raw_decode(text, here)
            start = offset + here - at
            record = text[here:end]
            offset = start + (len(record) if record.isascii() else len(record.encode()))
            starts.append(start)
            ends.append(offset)
            at = _skip(text, end)
            if text[at : at + 1] == "]":
                here = at
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            offset += at - end + 1
            at += 1
        if _skip(text, here + 1) != len(text):
            raise json.JSONDecodeError("Extra data after the list", text, here + 1)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not a JSON list: {error}.",
            got=f"{len(starts)} complete records before it",
            fix="if the file is truncated, download it again",
        ) from error
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it also matches the empty string
    return found.end()
