"""JSON lists and JSONL files whose records are read one at a time, however large the file is."""

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
    """The records of a JSON list or of a JSONL file, by number.

    Only the place of each record in the file is kept (16 bytes a record; JSONL 24), so that the workers of a DataLoader
    hold next to nothing; a record is read from the file when it is asked for. No file stays open. A JSON list is parsed
    once, in order to find where its records are.

    Args:
        path: The file. What it holds is seen from its first character, not from its name.

    Raises:
        DataError: If the file is missing, empty, or no JSON list and no JSONL.
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
                    f"{self.path} is no file of rows.",
                    expected="a JSON list of objects, or JSONL: one object per line",
                    got="an empty file" if not head else f"a file that begins with {head[:20]!r}",
                )
            self._starts, self._ends, self._lines = _index_lines(self.path)
        if not len(self):
            raise DataError(f"{self.path} holds no rows.", got="an empty list")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Any:
        """Read one record.

        Raises:
            DataError: If it is not JSON.
            ConfigError: If the file is no longer the one whose records were located.
        """
        with self._open() as file:
            return self._read(file, row)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """All records in order with their numbers; a record that is not JSON is left out."""
        with self._open() as file:
            for row in range(len(self)):
                try:
                    yield row, self._read(file, row)
                except DataError:
                    continue

    def place(self, row: int) -> Place:
        """Where a record stands."""
        return Place(str(self.path), row, None if self._lines is None else int(self._lines[row]))

    def _open(self) -> BinaryIO:
        file = self.path.open("rb")
        if os.fstat(file.fileno()).st_size != self._size:
            file.close()
            raise ConfigError(
                f"{self.path} has changed since its rows were located.",
                expected=f"{self._size:,} bytes",
                got=f"{self.path.stat().st_size:,} bytes",
                fix="build the data set anew",
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
    # `at` counts characters and `offset` bytes; between records stand only characters of one byte.
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
            got=f"{len(starts)} whole records before it",
            fix="if the file ends there, fetch it again",
        ) from error
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it matches the empty string, too
    return found.end()
