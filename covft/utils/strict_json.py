"""Reads JSON of a file that anyone may have written: every oddity is an error, none is guessed at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_strictly(path: Path, *, most_bytes: int = 1 << 24) -> Any:
    """Read a JSON file as RFC 8259 has it, with each name once per object.

    Args:
        path: A regular file.
        most_bytes: Larger files are refused unread; settings and lists of names have some kilobytes.

    Raises:
        ValueError: If it is too large or nested too deeply, not UTF-8, or not JSON; if an object has a name twice, a
            text has half a character, or a number is infinite, NaN or thousands of digits long.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    text = data.decode("utf-8")
    try:
        content = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float, parse_int=_whole
        )
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # "\ud800" is half a character
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:100]!r} stands twice in one object")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"the number {text[:40]}... has {len(text)} digits")
    return int(text)
