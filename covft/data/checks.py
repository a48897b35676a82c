"""Checks arguments and shows values of rows, so that errors name what was found."""

from __future__ import annotations

import operator
import reprlib
from typing import TYPE_CHECKING, Any

from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 3
_LONGEST = 300


def short(value: object) -> str:
    """Show a value of a row in one short line, however large or deep it is."""
    return shown(_SHORT.repr(value))


def shown(text: str) -> str:
    """Show a text of a file in one short line: what cannot be printed is escaped, the end may be missing."""
    clean = text if text.isprintable() else text.encode("unicode_escape").decode()
    return clean if len(clean) <= _LONGEST else f"{clean[:_LONGEST]}... ({len(text)} characters)"


def whole(value: Any, name: str, *, least: int | None = None, most: int | None = None) -> int:
    """Check an integer and return it; raises ConfigError."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is not None and (least is None or number >= least) and (most is None or number <= most):
        return number
    why = "cannot be used" if number is None else f"is below {least}" if most is None else "is out of range"
    limits = "" if least is None else f" >= {least}" if most is None else f" from {least} to {most}"
    raise ConfigError(f"{name}={short(value)} {why}.", expected=f"an integer{limits}", got=short(value))


def flag(value: Any, name: str) -> bool:
    """Check a bool; raises ConfigError. Strings such as "False" are true in Python."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={short(value)} cannot be used.", expected="True or False", got=short(value))
    return value


def string(value: Any, name: str) -> str:
    """Check a string; raises ConfigError."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}={short(value)} cannot be used.", expected="a string", got=type(value).__name__)
    return value


def function(value: Any, name: str) -> None:
    """Check that a value can be called; raises ConfigError."""
    if not callable(value):
        raise ConfigError(f"{name} cannot be called.", expected="a function or an object", got=short(value))


def color(value: Any, name: str) -> tuple[int, int, int]:
    """Check red, green and blue from 0 to 255; raises ConfigError."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise ConfigError(f"{name}={short(value)} is not a colour.", expected="(red, green, blue)", got=short(value))
    red, green, blue = (whole(part, name, least=0, most=255) for part in value)
    return red, green, blue


def picture(value: Any) -> Image.Image:
    """Check an image of PIL; raises ConfigError."""
    from PIL import Image as PILImage

    if not isinstance(value, PILImage.Image):
        raise ConfigError(
            "The image is not one of PIL.",
            expected="PIL.Image.Image",
            got=type(value).__name__,
            fix="PIL.Image.fromarray(...)",
        )
    return value
