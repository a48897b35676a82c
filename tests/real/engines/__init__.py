"""One module for each trainer or codebase."""

from __future__ import annotations

from pathlib import Path


def names() -> list[str]:
    """Return the names of the engines."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
