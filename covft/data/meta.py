"""Reads InternVL's meta file: the data sets of a mixture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from covft.data.broken import DataError
from covft.data.checks import short
from covft.data.files import check_path, read_regular
from covft.data.tiling import MOST_TILES
from covft.errors import ConfigError

_MAX_META_BYTES = 16 << 20
_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class MetaEntry:
    """One data set of a mixture; the fields are the keys of the meta file.

    Attributes:
        name: Name in the meta file.
        root: Folder of images; empty for text only.
        annotation: JSONL file.
        data_augment: Whether to augment the images in training.
        repeat_time: Repeats per epoch, at most 10,000. Below 1: the first `int(rows * repeat_time)` rows; above 1: that
            many complete copies, and the first rows again for the fraction.
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
        for field in ("name", "annotation", "root"):
            if not isinstance(getattr(self, field), str):
                raise self._invalid(field, "a string")
        if not isinstance(self.data_augment, bool):  # the string "False" would be true
            raise self._invalid("data_augment", "true or false")
        repeat = self.repeat_time
        if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 < repeat <= _MOST_REPEATS:
            raise self._invalid(
                "repeat_time",
                f"a number above 0, at most {_MOST_REPEATS:,}",
                fix="remove the data set from the meta file to skip it",
            )
        for field, least, most in (("length", 0, None), ("max_dynamic_patch", 1, MOST_TILES)):
            value = getattr(self, field)
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not is_number or value < least or (most is not None and value > most)):
                raise self._invalid(field, f"an integer >= {least}" if most is None else f"1 to {most}")

    def _invalid(self, field: str, expected: str, fix: str | None = None) -> ConfigError:
        return ConfigError(
            f"{field} of {short(self.name)} is invalid.", expected=expected, got=short(getattr(self, field)), fix=fix
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
        DataError: If the file is missing, not a regular one, above 16 MiB or not such JSON.
        ConfigError: If a value is invalid.
    """
    file = check_path(path, "The meta file")
    try:
        meta = json.loads(read_regular(file, "The meta file", _MAX_META_BYTES))
    except (ValueError, RecursionError) as error:
        problem = error.reason if isinstance(error, DataError) else f"The meta file {file} cannot be read."
        raise DataError(problem, got=None if isinstance(error, DataError) else str(error)) from error
    if not isinstance(meta, Mapping) or not meta:
        raise DataError(
            f"{file} is not a meta file.",
            expected='{"name": {"root": ..., "annotation": "....jsonl", "repeat_time": 1}, ...}',
            got=f"{type(meta).__name__} of {len(meta)}" if isinstance(meta, (Mapping, list)) else type(meta).__name__,
        )
    known = {field.name for field in fields(MetaEntry)} - {"name"}
    entries = []
    for name, values in meta.items():
        if not isinstance(values, Mapping) or not isinstance(values.get("annotation"), str):
            raise DataError(f"{short(name)} in {file} has no annotation.", expected="the name of a JSONL file")
        try:
            entries.append(MetaEntry(name=name, **{key: value for key, value in values.items() if key in known}))
        except ConfigError as error:
            problem = f"{file}: {error.problem}"
            raise ConfigError(problem, expected=error.expected, got=error.got, fix=error.fix) from error
    return entries
