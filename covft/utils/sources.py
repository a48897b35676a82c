"""Names of models with options, such as `timm:test_vit?num_classes=0` and `bert-base-uncased?pooling=cls`."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """Add options to a name, in their order; None is left out.

    Example:
        >>> with_options("timm:test_vit", {"num_classes": 0, "img_size": None})
        'timm:test_vit?num_classes=0'
    """
    given = {key: str(value) for key, value in options.items() if value is not None}
    return f"{name}?{urlencode(given)}" if given else name


def split_options(name: str) -> tuple[str, dict[str, str]]:
    """Invert `with_options`; a folder or file whose own name has a question mark keeps it.

    Example:
        >>> split_options("timm:test_vit?num_classes=0")
        ('timm:test_vit', {'num_classes': '0'})
    """
    source, mark, query = name.partition("?")
    if not mark or exists(name):
        return name, {}
    return source, dict(parse_qsl(query, keep_blank_values=True))


def split_values(name: str) -> tuple[str, dict[str, Any]]:
    """Split a name from its options, read as Python's literals; what is not one stays a string.

    Example:
        >>> split_values("timm:test_vit?num_classes=0&global_pool=avg")
        ('timm:test_vit', {'num_classes': 0, 'global_pool': 'avg'})
    """
    source, texts = split_options(name)
    return source, {key: _value(text) for key, text in texts.items()}


def is_folder_name(name: str) -> bool:
    """Return whether a string names a folder rather than a model id (which has at most one slash)."""
    looks_like_path = name.startswith((".", "~", "/", os.sep)) or name.count("/") > 1 or "\\" in name
    return looks_like_path or exists(name, folder=True)


def exists(name: str, *, folder: bool = False) -> bool:
    """Return whether a file or folder has this name; a string that no path can be is not one."""
    try:
        return Path(name).is_dir() if folder else Path(name).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
