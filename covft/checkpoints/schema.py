"""The fields of `covft_config.json`, every one checked before anything is built from it.

A new field needs its line here. Fields that this version does not know are refused: they may change what the weights
mean.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from typing import Any

from covft.checkpoints.sources import REVISION
from covft.config import MOST_BLOCKS, CoVFTConfig
from covft.errors import CheckpointError, ConfigError
from covft.utils.arguments import MOST

# The types that weights may be saved in; buffers may hold whole numbers.
DTYPES = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    | {"int64", "int32", "int16", "int8", "uint8", "bool"}
)
_Check = Callable[[Any], "str | None"]  # returns what was expected; None if the value is that


def check_fields(config: Mapping[str, Any], path: object) -> None:
    """Check the content of a `covft_config.json`.

    Args:
        config: Its content.
        path: Where it was read, for the message.

    Raises:
        CheckpointError: If a field is missing or unknown, or has a value that no version writes.
    """
    tuned = "method" in config  # by another method than covft
    problem = _find("", config, _METHOD_FIELDS if tuned else _FIELDS)
    if problem is None and not tuned:
        try:
            CoVFTConfig.from_dict(config["covft"])
        except ConfigError as error:
            problem = ("covft", error.expected, error.got)
    if problem is not None:
        name, expected, got = problem
        raise CheckpointError(
            f"{path} is damaged, or of a later version of covft: {name or 'its content'} cannot be used.",
            expected=expected,
            got=got,
            fix="copy the complete folder again, or upgrade covft",
        )


def _find(name: str, value: Any, wanted: Any) -> tuple[str, Any, Any] | None:
    """Return the first field that is wrong, with what was expected and what was found."""
    if not isinstance(wanted, Mapping):
        expected = wanted(value)
        return None if expected is None else (name, expected, _shown(value))
    if not isinstance(value, Mapping):
        return name, "a JSON object", _shown(value)
    known = {field.rstrip("?"): check for field, check in wanted.items()}
    unknown = sorted(set(value) - set(known))
    if unknown:
        return _joined(name, unknown[0]), ", ".join(known), f"a field {unknown[0][:100]!r}"
    for field, check in wanted.items():
        if field.endswith("?") and field.rstrip("?") not in value:
            continue
        if field not in value and not field.endswith("?"):
            return _joined(name, field), "a value", "none"
        problem = _find(_joined(name, field.rstrip("?")), value[field.rstrip("?")], check)
        if problem is not None:
            return problem
    return None


def _joined(name: str, field: str) -> str:
    return f"{name}.{field[:100]}" if name else field[:100]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# --------------------------------------------------------------------------------- checks


def _whole(least: int, most: int = MOST, *, or_none: bool = False) -> _Check:
    def check(value: Any) -> str | None:
        right = type(value) is int and least <= value <= most
        return None if right or (or_none and value is None) else f"a whole number in [{least}, {most}]"

    return check


def _text(pattern: str = r"(?s:.{0,65536})", *, or_none: bool = False) -> _Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, str) and re.fullmatch(pattern, value)
        return None if right or (or_none and value is None) else f"a text like {pattern}"

    return check


def _exactly(wanted: Any) -> _Check:
    return lambda value: None if type(value) is type(wanted) and value == wanted else repr(wanted)


def _names(value: Any) -> str | None:
    right = isinstance(value, list) and all(_text()(name) is None for name in value) and len(set(value)) == len(value)
    return None if right else "a list of names, each once"


def _layers(value: Any) -> str | None:
    right = isinstance(value, list) and value and all(_whole(0, 9999)(layer) is None for layer in value)
    return None if right else "a list of block indices"


def _samples(value: Any) -> str | None:
    try:
        right = isinstance(value, str) and len(base64.b64decode(value, validate=True)) % 4 == 0
    except (binascii.Error, ValueError):
        right = False
    return None if right else "numbers in base64"


def _dtype(value: Any) -> str | None:
    return None if isinstance(value, str) and value in DTYPES else f"one of {', '.join(sorted(DTYPES))}"


def _dtypes(value: Any) -> str | None:
    right = isinstance(value, dict) and all(_text()(name) is None and _dtype(value[name]) is None for name in value)
    return None if right else f"types by name, of {', '.join(sorted(DTYPES))}"


def _scalars(value: Any) -> str | None:
    right = value is None or (
        isinstance(value, dict)
        and all(entry is None or isinstance(entry, str | bool | int | float) for entry in value.values())
    )
    return None if right else "an object of texts, numbers and switches, or null"


def _setting(name: str) -> _Check:
    """Return the check of a field of `CoVFTConfig` by the type in its annotation; `from_dict` checks the rest."""
    if name == "layers":
        return _layers
    kind = str(CoVFTConfig.__annotations__[name])
    if "int" in kind:
        return _whole(-MOST, or_none="None" in kind)
    if "float" in kind:
        return lambda value: None if type(value) in (int, float) or (value is None and "None" in kind) else "a number"
    if "bool" in kind:
        return lambda value: None if isinstance(value, bool) else "true or false"
    return _text(or_none="None" in kind)


def _options(value: Any) -> str | None:
    def plain(entry: Any) -> bool:
        return entry is None or isinstance(entry, str | bool | int | float)

    right = isinstance(value, dict) and all(
        _text(r"[a-z]\w{0,63}")(name) is None
        and (plain(entry) or (isinstance(entry, list) and len(entry) < MOST_BLOCKS and all(map(plain, entry))))
        for name, entry in value.items()
    )
    return None if right else "options by name: numbers, texts, switches and lists of them"


_SHA256 = _text(r"[0-9a-f]{64}")
_COMMON: dict[str, Any] = {
    "format": _exactly(1),
    "library_version": _text(r"[\w.+!-]{1,64}"),
    "base": {
        "source": _text(or_none=True),
        "revision": _text(REVISION, or_none=True),
        "library": _text(),
        "class_name": _text(),
        "fingerprint": {
            "num_tensors": _whole(0, 10**7),
            "names": _SHA256,
            "types": _SHA256,
            "values": _SHA256,
            "samples": _samples,
        },
    },
    "text": {
        "source": _text(or_none=True),
        "text_dim": _whole(1, or_none=True),
        "revision": _text(REVISION, or_none=True),
    },
    "dtype": _dtype,
    "other_dtypes?": _dtypes,
    "weights": {"file": _exactly("model.safetensors"), "bytes": _whole(0, 2**60), "sha256": _SHA256},
}
_FIELDS: dict[str, Any] = {
    **_COMMON,
    # Settings that a later version added have their default; `layers` are those of this ViT.
    "covft": {("layers" if name == "layers" else f"{name}?"): _setting(name) for name in CoVFTConfig.__annotations__},
    "reading?": _scalars,  # how `attach` reads the text from prompts
    "cleaning?": _whole(1, 9999),  # the rules of cleaned instructions; absent before their second version
    "extra": _names,
}
_METHOD_FIELDS: dict[str, Any] = {
    **_COMMON,
    "reading?": _scalars,
    "method": {"name": _text(r"[a-z]\w{0,63}"), "options": _options},
}
