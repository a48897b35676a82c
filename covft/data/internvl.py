"""Reads the rows of InternVL's mixtures: data sets with images, JSONL and a repeat factor."""

from __future__ import annotations

import bisect
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from covft.data.broken import DataError, Place
from covft.data.checks import short, shown
from covft.data.images import ImageFolder, ImageStore, image_store
from covft.data.meta import MetaEntry, read_meta
from covft.data.records import JsonRecords, row_number
from covft.data.rows import Row, parse_row
from covft.errors import ConfigError, CoVFTError

if TYPE_CHECKING:
    from PIL import Image


class InternVLRows:
    """Reads the rows of a mixture, data set after data set, each repeated by its `repeat_time`.

    Args:
        meta: A meta file, or its entries.
        images: Stores such as `TarImages` by name of data set, for data sets whose images are not in their `root`.

    Raises:
        DataError: If a file or a folder cannot be read.
        ConfigError: If a value is invalid, or a store names an unknown data set.

    Example:
        >>> rows = InternVLRows("meta.json")
        >>> rows[0].dataset
        'sharegpt4v_instruct'
    """

    def __init__(
        self,
        meta: str | os.PathLike[str] | list[MetaEntry],
        images: Mapping[str, ImageStore] | None = None,
    ) -> None:
        entries = meta if isinstance(meta, (list, tuple)) else read_meta(meta)
        if not entries or not all(isinstance(entry, MetaEntry) for entry in entries):
            raise ConfigError("meta is not a list of entries.", expected="at least one MetaEntry", got=short(meta))
        self.entries = list(entries)
        if images is not None and not isinstance(images, Mapping):
            raise ConfigError(
                "images is not a mapping.", expected="{name of a data set: TarImages(...)}", got=short(images)
            )
        stores = {name: image_store(store) for name, store in (images or {}).items()}
        unknown = sorted(set(stores) - {entry.name for entry in self.entries}, key=str)
        if unknown:
            raise ConfigError(
                "images names data sets that are not in the meta file.",
                got=", ".join(map(str, unknown)),
                known=", ".join(entry.name for entry in self.entries),
            )
        self.records: list[JsonRecords] = []
        self._stores: list[ImageStore | None] = []
        for entry in self.entries:
            try:
                records = JsonRecords(entry.annotation)
                folder = ImageFolder(entry.root) if entry.root and entry.name not in stores else None
            except CoVFTError as error:
                where = "" if isinstance(meta, (list, tuple)) else f" in {os.fspath(meta)}"
                problem = f"{short(entry.name)}{where}: {error.problem}"
                raise DataError(problem, expected=error.expected, got=error.got, fix=error.fix) from error
            self.records.append(records)
            self._stores.append(stores.get(entry.name, folder))
            if entry.length is not None and entry.length != len(records):
                warnings.warn(
                    f"The meta file gives {short(entry.name)} {entry.length} rows; "
                    f"{entry.annotation} has {len(records)}.",
                    UserWarning,
                    stacklevel=2,
                )
        counts = [entry.count(len(records)) for entry, records in zip(self.entries, self.records, strict=True)]
        empty = [entry.name for entry, count in zip(self.entries, counts, strict=True) if not count]
        if empty:
            raise ConfigError(
                "repeat_time leaves a data set without rows.", expected="at least one row of each", got=", ".join(empty)
            )
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        number, row = self._locate(index)
        entry, record = self.entries[number], self.records[number][row]
        try:
            parsed = parse_row(record, add_missing_tag=True)
        except DataError as error:
            raise error.at(self.place(index)) from error.__cause__
        return replace(parsed, dataset=entry.name, max_tiles=entry.max_dynamic_patch, augment=entry.data_augment)

    def place(self, index: int) -> Place:
        """Locate a row by file, index and line; copies of a repeated row share one place."""
        number, row = self._locate(index)
        return self.records[number].place(row)

    def image(self, index: int, name: str) -> Image.Image:
        """Read an image of a row as RGB.

        Raises:
            DataError: If it is missing or damaged.
            ConfigError: If its data set has no `root`.
        """
        number, _ = self._locate(index)
        store = self._stores[number]
        if store is None:
            raise ConfigError(
                f"{self.place(index)} has the image {shown(name)}, but {self.entries[number].name!r} has no root.",
                fix='"root": "folder" in the meta file',
            )
        return store.open(name)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Iterate over indices and raw records, repeats included; lines that are not JSON are skipped."""
        start = 0
        for records, end in zip(self.records, self._ends, strict=True):
            rows = len(records)
            for row, record in records.scan():
                for index in range(start + row, end, rows):
                    yield index, record
            start = end

    def _locate(self, index: int) -> tuple[int, int]:
        index = row_number(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return number, (index - start) % len(self.records[number])
