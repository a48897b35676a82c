"""Reads InternVL's meta file: a mixture of data sets, each with images, JSONL and a repeat factor."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covft.data.broken import DataError, Place
from covft.data.images import ImageFolder, ImageStore
from covft.data.records import JsonRecords
from covft.data.rows import Row, parse_row
from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class MetaEntry:
    """One data set of a mixture; the fields are the keys of the meta file.

    Attributes:
        name: Name in the meta file.
        root: Folder of images; empty for text only.
        annotation: JSONL file.
        data_augment: Whether to augment the images in training.
        repeat_time: Repeats per epoch. Below 1: the first `int(rows * repeat_time)` rows; above 1: that many complete
            copies, and the first rows again for the fraction.
        length: Number of rows according to the meta file, or None.
        max_dynamic_patch: Maximum of tiles per image, or None for the setting of the `ConversationDataset`.

    Raises:
        ConfigError: If a value is invalid.
    """

    name: str
    annotation: str
    root: str = ""
    data_augment: bool = False
    repeat_time: float = 1
    length: int | None = None
    max_dynamic_patch: int | None = None

    def __post_init__(self) -> None:
        if (
            isinstance(self.repeat_time, bool)
            or not isinstance(self.repeat_time, (int, float))
            or self.repeat_time <= 0
        ):
            raise ConfigError(
                f"repeat_time of {self.name!r} is invalid.",
                expected="a number > 0",
                got=repr(self.repeat_time),
                fix="remove the data set from the meta file to skip it",
            )
        tiles = self.max_dynamic_patch
        if tiles is not None and (isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1):
            raise ConfigError(
                f"max_dynamic_patch of {self.name!r} is invalid.", expected="an integer >= 1", got=repr(tiles)
            )

    def count(self, rows: int) -> int:
        """Count the rows per epoch of a data set with this many rows."""
        whole = int(self.repeat_time)
        return whole * rows + int(rows * (self.repeat_time - whole))


def read_meta(path: str | os.PathLike[str]) -> list[MetaEntry]:
    """Read a meta file: `{name: {root, annotation, data_augment, repeat_time, length, max_dynamic_patch}}`.

    Args:
        path: The JSON file. Relative paths in it start from the working directory, as in InternVL.

    Returns:
        The data sets, in the order of the file. Unknown keys are ignored.

    Raises:
        DataError: If the file is missing or not such JSON.
        ConfigError: If a value is invalid.
    """
    try:
        meta = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"The meta file {os.fspath(path)} cannot be read.", got=str(error)) from error
    if not isinstance(meta, Mapping) or not meta:
        raise DataError(
            f"{os.fspath(path)} is not a meta file.",
            expected='{"name": {"root": ..., "annotation": "....jsonl", "repeat_time": 1}, ...}',
            got=f"{type(meta).__name__} of {len(meta)}" if isinstance(meta, (Mapping, list)) else type(meta).__name__,
        )
    known = {field.name for field in fields(MetaEntry)} - {"name"}
    entries = []
    for name, values in meta.items():
        if not isinstance(values, Mapping) or not isinstance(values.get("annotation"), str):
            raise DataError(f"{name!r} in {os.fspath(path)} has no annotation.", expected="the name of a JSONL file")
        entries.append(MetaEntry(name=name, **{key: value for key, value in values.items() if key in known}))
    return entries


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
        self.entries = read_meta(meta) if isinstance(meta, (str, os.PathLike)) else list(meta)
        stores = dict(images or {})
        unknown = sorted(set(stores) - {entry.name for entry in self.entries})
        if unknown:
            raise ConfigError(
                "images names data sets that are not in the meta file.",
                got=", ".join(unknown),
                known=", ".join(entry.name for entry in self.entries),
            )
        self.records = [JsonRecords(entry.annotation) for entry in self.entries]
        self._stores: list[ImageStore | None] = []
        for entry, records in zip(self.entries, self.records, strict=True):
            self._stores.append(stores.get(entry.name) or (ImageFolder(entry.root) if entry.root else None))
            if entry.length is not None and entry.length != len(records):
                warnings.warn(
                    f"The meta file gives {entry.name!r} {entry.length} rows; {entry.annotation} has {len(records)}.",
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
        return replace(parsed, dataset=entry.name, max_tiles=entry.max_dynamic_patch, augment=bool(entry.data_augment))

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
                f"{self.place(index)} has the image {name}, but {self.entries[number].name!r} has no root.",
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
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return number, (index - start) % len(self.records[number])
