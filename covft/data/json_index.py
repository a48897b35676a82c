"""Locates the records of JSON lists and JSONL files, reading them in pieces."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from array import array
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from covft.data.broken import DataError

BOM = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 8 << 20
_PIECE = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[{]+|[\]}]+', re.DOTALL)


class Index(NamedTuple):
    """Where the records of a file are.

    Attributes:
        starts: First byte of each record.
        ends: The byte after each record.
        checksums: CRC-32 of each record.
        lines: Line of each record, from 1; None if records are not lines.
    """

    starts: np.ndarray
    ends: np.ndarray
    checksums: np.ndarray
    lines: np.ndarray | None = None


def index_lines(file: BinaryIO) -> Index:
    """Locate the lines of a JSONL file that are not blank."""
    starts, ends, checksums, numbers = array("q"), array("q"), array("Q"), array("q")
    offset, number = 0, 0
    while line := file.readline(_PIECE):
        start, checksum, blank = offset, zlib.crc32(line), not line.strip()
        offset, number = offset + len(line), number + 1
        while not line.endswith(b"\n") and (line := file.readline(_PIECE)):  # a long line, in pieces
            checksum, blank, offset = zlib.crc32(line, checksum), blank and not line.strip(), offset + len(line)
        if not blank:
            starts.append(start)
            ends.append(offset)
            checksums.append(checksum)
            numbers.append(number)
    return Index(_numbers(starts), _numbers(ends), _checksums(checksums), _numbers(numbers))


def index_list(file: BinaryIO, path: Path) -> Index:
    """Locate the records of a JSON list.

    Raises:
        DataError: If the file is not a JSON list.
    """
    starts, ends, checksums = array("q"), array("q"), array("Q")
    text = _Text(file)
    decoder = json.JSONDecoder()
    try:
        text.take("[")
        while not (text.peek() == "]" and not starts):
            start = text.skip_space()
            record = text.take_value(decoder)
            starts.append(start)
            ends.append(text.offset)
            checksums.append(zlib.crc32(record))
            if text.peek() == "]":
                break
            text.take(",")
        text.take("]")
        if text.peek():
            raise _NotJsonError("Extra data after the list")
    except _NotJsonError as error:
        raise DataError(
            f"{path} is not a JSON list: {error} at byte {text.offset:,}.",
            got=f"{len(starts)} complete records before it",
            fix="if the file is truncated, download it again",
        ) from error
    return Index(_numbers(starts), _numbers(ends), _checksums(checksums))


class _NotJsonError(ValueError):
    pass


class _Text:
    """The text of a file, of which a piece is in memory.

    Bytes that are not UTF-8 become surrogates, so that every character has its bytes and only its own row is broken.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.offset = 0  # in bytes, of the next character
        self._text, self._at, self._ended = "", 0, False
        if file.read(len(BOM)) == BOM:
            self.offset = len(BOM)
        else:
            file.seek(0)

    def skip_space(self) -> int:
        """Move to the next character that is not white space, and return its offset."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None  # it also matches the empty string
            self._move(found.end(), found.end() - self._at)
            if self._at < len(self._text) or not self._more(_PIECE):
                return self.offset

    def peek(self) -> str:
        """Show the next character that is not white space; empty at the end."""
        self.skip_space()
        return self._text[self._at : self._at + 1]

    def take(self, mark: str) -> None:
        """Move past a mark."""
        if self.peek() != mark:
            raise _NotJsonError(f"Expecting '{mark}'" if mark != "," else "Expecting ',' or ']'")
        self._move(self._at + 1, 1)

    def take_value(self, decoder: json.JSONDecoder) -> bytes:
        """Move past a value and return its bytes."""
        while True:
            try:
                end = _end_of_value(decoder, self._text, self._at)
                if end < len(self._text) or self._ended:
                    break
            except json.JSONDecodeError as error:
                if self._ended:
                    raise _NotJsonError(error.msg) from error
            held = len(self._text) - self._at
            if held > MAX_ROW_BYTES:
                raise _NotJsonError(f"No record ends within {MAX_ROW_BYTES:,} characters")
            self._more(min(max(held, _PIECE), MAX_ROW_BYTES + 1 - held))
        value = self._text[self._at : end].encode("utf-8", "surrogateescape")
        self._move(end, len(value))
        return value

    def _move(self, at: int, size: int) -> None:
        self.offset += size
        self._at = at

    def _more(self, size: int) -> bool:
        data = self._file.read(size)
        self._ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0
        return not self._ended


def _end_of_value(decoder: json.JSONDecoder, text: str, at: int) -> int:
    """Find the end of a value; values that are JSON but cannot be read, such as very deep ones, have one too."""
    try:
        return decoder.raw_decode(text, at)[1]
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        depth = 0
        for mark in _MARKS.finditer(text, at):
            if mark[0][0] == '"':
                if not mark[1]:
                    break
            elif mark[0][0] in "[{":
                depth += len(mark[0])
            elif len(mark[0]) < depth:
                depth -= len(mark[0])
            else:
                return mark.start() + depth
        raise json.JSONDecodeError("Unterminated value", text, at) from None


def _numbers(values: array[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _checksums(values: array[int]) -> np.ndarray:
    return np.array(values, np.uint32)
