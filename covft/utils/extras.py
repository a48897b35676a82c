"""Optional libraries, imported where they are needed; a missing one is reported with its pip extra."""

from __future__ import annotations

import importlib
from typing import Any

from covft.errors import MissingDependencyError


def import_library(module: str, extra: str, *, needed_by: str) -> Any:
    """Import a module of a pip extra of covft; `needed_by` is the subject of the message if it is missing.

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
