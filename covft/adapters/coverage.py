"""Reads the packaged results of `python -m benchmarks.coverage`, which tries every model of a library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covft.errors import ConfigError

LIBRARIES = ("open_clip", "timm", "transformers")
FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class CoverageRow:
    """Models of one class with the same result.

    Attributes:
        class_name: Class of the models.
        verdict: `"wrapped"`, `"refused"` (with an error that explains it) or `"failed"`.
        reason: One line, for refused and failed models.
        layouts: Layouts of the tokens at their FFNs; see `BlockSpec`.
        blocks: Smallest and largest number of FFNs in a model.
        models: Their names.
    """

    class_name: str
    verdict: str
    reason: str
    layouts: tuple[str, ...]
    blocks: tuple[int, int]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """Results for all models of a library that have attention.

    Attributes:
        library: The library.
        version: The version that was tried.
        rows: Results, sorted by verdict and class.
    """

    library: str
    version: str
    rows: tuple[CoverageRow, ...]

    def count(self, verdict: str | None = None) -> int:
        """Return the number of models, with one verdict or in total."""
        return sum(len(row.models) for row in self.rows if verdict in (None, row.verdict))


def load_coverage(library: str) -> Coverage:
    """Load the results for the models of a library.

    Args:
        library: `"timm"`, `"open_clip"` or `"transformers"`.

    Raises:
        ConfigError: If the library is unknown or was not tried.

    Example:
        >>> load_coverage("transformers").count("wrapped") > 100
        True
    """
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if library not in found:
        raise ConfigError(
            f"covft has no table for {library!r}.",
            expected=", ".join(sorted(found)) or "a table made by python -m benchmarks.coverage",
            got=library,
            fix=f"covft describe --all {sorted(found)[0]}" if found else None,
        )
    entry = found[library]
    rows = tuple(
        CoverageRow(
            class_name=row["class_name"],
            verdict=row["verdict"],
            reason=row["reason"],
            layouts=tuple(row["layouts"]),
            blocks=(row["blocks"][0], row["blocks"][1]),
            models=tuple(row["models"]),
        )
        for row in entry["rows"]
    )
    return Coverage(library, entry["version"], rows)
