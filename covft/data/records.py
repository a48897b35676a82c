"""Reads single records of JSON lists and JSONL files of any size."""

from __future__ import annotations

import json
import operator
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from covft.data.broken import DataError, Place
from covft.data.checks import short
from covft.data.files import check_path, open_regular
from covft.data.json_index import BOM, MAX_ROW_BYTES, Index, index_lines, index_list
from covft.errors import ConfigError


class JsonRecords:
    """Reads the records of a JSON list or a JSONL file by index.

    Only offsets and checksums of the records stay in memory (20 bytes per record; JSONL 28), so that the workers of a
    DataLoader stay small. No file stays open. The file is read once, in pieces, to locate its records. A record that is
    read later must be the one that was located.

    Args:
        path: The file. Its first character, not its name, tells the format.

    Raises:
        ConfigError: If `path` is not a path.
        DataError: If the file is missing, empty, not a regular file, or neither a JSON list nor JSONL.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_path(path, "The annotation file")
        with open_regular(self.path, "The annotation file") as file:
            self._size = os.fstat(file.fileno()).st_size
            head = file.read(1 << 12).removeprefix(BOM).lstrip()
            file.seek(0)
            self._index = self._locate(file, head)
        if not len(self):
            raise DataError(f"{self.path} has no rows.", got="an empty list")

    def _locate(self, file: BinaryIO, head: bytes) -> Index:
        if head.startswith(b"["):
            return index_list(file, self.path)
        first, _, _ = head.partition(b"\n")
        if head[:1] != b"{" or (first.strip() == b"{" and b"\n" in head):
            raise DataError(
                f"{self.path} is not a file of rows.",
                expected="a JSON list of objects, or JSONL: one object per line",
                got="an empty file" if not head else f"a file that starts with {head[:20]!r}",
            )
        return index_lines(file)

    def __len__(self) -> int:
        return len(self._index.starts)

    def __getitem__(self, row: int) -> Any:
        """Read one record.

        Raises:
            DataError: If it is not JSON, or larger than 8 MiB.
            ConfigError: If the file has changed or is gone.
            IndexError: If there is no such row.
        """
        row = self._number(row)
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
        row = self._number(row)
        return Place(str(self.path), row, None if self._index.lines is None else int(self._index.lines[row]))

    def _number(self, row: int) -> int:
        return row_number(row, len(self))

    def _open(self) -> BinaryIO:
        try:
            file = open_regular(self.path, "The annotation file")
        except DataError as error:
            raise self._changed(error.reason) from error
        size = os.fstat(file.fileno()).st_size
        if size != self._size:
            file.close()
            raise self._changed(f"{size:,} bytes instead of {self._size:,}")
        return file

    def _read(self, file: BinaryIO, row: int) -> Any:
        start, end = int(self._index.starts[row]), int(self._index.ends[row])
        if end - start > MAX_ROW_BYTES:
            reason = f"The row has {end - start:,} bytes, more than the limit of {MAX_ROW_BYTES:,}."
            raise DataError(reason, place=self.place(row))
        file.seek(start)
        data = file.read(end - start)
        if zlib.crc32(data) != self._index.checksums[row]:
            raise self._changed(f"other bytes in {self.place(row)}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:  # also not UTF-8, numbers of 5,000 digits
            raise DataError(f"The row is not JSON that can be read: {error}.", place=self.place(row)) from error

    def _changed(self, got: str) -> ConfigError:
        return ConfigError(
            f"{self.path} has changed since its records were located.", got=got, fix="rebuild the data set"
        )


def row_number(row: Any, rows: int) -> int:
    """Check an index and count it from 0.

    Raises:
        ConfigError: If it is not an integer.
        IndexError: If there is no such row.
    """
    try:
        number = operator.index(row)
    except TypeError:
        raise ConfigError("A row is chosen by its index.", expected="an integer", got=short(row)) from None
    if not -rows <= number < rows:
        raise IndexError(f"row {number} of {rows}")
    return number % rows
