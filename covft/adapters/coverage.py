"""What was found for every model of a library by `python -m benchmarks.coverage`, as the package carries it."""

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
    """Models of one class for which the same was found.

    Attributes:
        class_name: Class of the models.
        verdict: `"wrapped"`, `"refused"` (with an error that says why) or `"failed"`.
        reason: Why they were refused or failed, one line.
        layouts: Layouts of the tokens at their FFNs; see `BlockSpec`.
        blocks: Fewest and most FFNs of a model.
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
    """All models of a library that have attention.

    Attributes:
        library: The library.
        version: Its version at the time.
        rows: What was found, sorted by verdict and class.
    """

    library: str
    version: str
    rows: tuple[CoverageRow, ...]

    def count(self, verdict: str | None = None) -> int:
        """How many models there are, of a verdict or of all."""
        return sum(len(row.models) for row in self.rows if verdict in (None, row.verdict))


def load_coverage(library: str) -> Coverage:
    """What was found for the models of a library.

    Args:
        library: `"timm"`, `"open_clip"` or `"transformers"`.

    Raises:
        ConfigError: If the library is another, or was not checked.

    Example:
        >>> load_coverage("transformers").count("wrapped") > 100
        True
    """
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if library not in found:
        raise ConfigError(
            f"There is no table for {library!r}.",
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
