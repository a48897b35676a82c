"""Optional libraries: imported where they are needed, and missed with the name of the pip extra."""

from __future__ import annotations

import importlib
from typing import Any

from covft.errors import MissingDependencyError


def import_library(module: str, extra: str, *, needed_by: str) -> Any:
    """Import an optional library.

    Args:
        module: What to import.
        extra: The pip extra of covft that brings it.
        needed_by: Subject of the message, such as `"This text encoder"`.

    Returns:
        The module.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise MissingDependencyError(
            f"{needed_by} needs {module}, which is not installed.", fix=f'pip install "covft[{extra}]"'
        ) from error
