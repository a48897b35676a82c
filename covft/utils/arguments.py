"""Checks the kinds of arguments against a function's own annotations."""

from __future__ import annotations

import builtins
import collections.abc
import functools
import inspect
import itertools
import math
import numbers
import operator
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import typing_extensions

from covft.errors import ArgumentError, ConfigError

MOST = 1 << 20
"""Bound on every width and number in a setting: one that is larger was not meant."""

Checked = TypeVar("Checked", bound=Callable[..., Any])


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(operator.index(value), int)
    except (TypeError, RuntimeError):  # of a tensor with several elements
        return False


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and os.fspath(value) != "" and "\0" not in os.fspath(value)


def _is_device(value: Any) -> bool:
    import torch

    try:
        return isinstance(value, torch.device) or (isinstance(value, str) and torch.device(value) is not None)
    except RuntimeError:  # of a string that names none
        return False


def _is_iterable(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, str | bytes | type)


def _is_sequence(value: Any) -> bool:
    unordered = isinstance(value, collections.abc.Mapping | collections.abc.Set)
    return _is_iterable(value) and not unordered and hasattr(value, "__getitem__") and hasattr(value, "__len__")


# Kinds whose test is not isinstance, with their name: `True` is not a number, a text is not a sequence of texts.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    Any: ("anything", lambda value: True),
    object: ("anything", lambda value: True),
    type(None): ("None", lambda value: value is None),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", _is_whole),
    float: ("a finite number", _is_finite),
    str: ("a string", lambda value: isinstance(value, str)),
    os.PathLike: ("a path", _is_path),
    pathlib.Path: ("a path", _is_path),
    collections.abc.Callable: ("a callable", callable),
    collections.abc.Iterable: ("an iterable", _is_iterable),
    collections.abc.Collection: ("a collection", _is_iterable),
    collections.abc.Sequence: ("a list or tuple", _is_sequence),
}


# Kinds that a string may name: beside one of these in a union, `str` alone is not enough.
_NAMED = {"Path", "PathLike", "device"}


def check_kinds(function: Checked) -> Checked:
    """Refuse arguments of another kind than a function's annotations say, before it runs.

    Unions, `list[int]` and the like are followed; `Any`, and a protocol that cannot be tested, accept everything. It
    costs some microseconds a call, so it is for functions that users call, not for those that run in every block.

    Args:
        function: A function, or a dataclass, whose fields are then checked.

    Example:
        >>> @check_kinds
        ... def halve(number: float) -> float:
        ...     return number / 2
        >>> halve("4")
        Traceback (most recent call last):
            ...
        covft.errors.ArgumentError: halve() cannot use number='4'.
          Expected: a finite number
          Got:      str
    """
    if isinstance(function, type):
        function.__init__ = check_kinds(function.__init__)
        return function  # type: ignore[return-value]
    signature = inspect.signature(function)
    owner, _, method = function.__qualname__.rpartition(".")
    called = owner if method == "__init__" else method

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        import torch  # late: `covft version` needs none of it

        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python's own message names the argument
        for name, kind in _annotations(function).items():
            if name in given and not _is_of(given[name], kind):
                value = given[name]
                raise ArgumentError(
                    f"{called}() cannot use {name}={short(value)}.", expected=_told(kind), got=type(value).__name__
                )
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


class _Unknown:
    """A module that is imported for type checkers alone, since its import is slow: its classes accept everything."""

    def __getattr__(self, name: str) -> Any:
        return Any


class _Names(dict[str, Any]):
    """The names of a module."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, None) or _Unknown()


def check_sizes(**sizes: int | None) -> None:
    """Refuse numbers of something, and widths, that no model can have.

    Args:
        **sizes: The numbers by name; None is passed over.

    Raises:
        ConfigError: If one is not from 1 to `MOST`.
    """
    for name, size in sizes.items():
        if size is not None and not 1 <= size <= MOST:
            expected = f"a whole number from 1 to {MOST}"
            raise ConfigError(f"{name}={short(size)} cannot be used.", expected=expected, got=short(size))


def check_strength(strength: Any) -> float:
    """Return the strength of what was trained.

    Args:
        strength: What it was set to.

    Raises:
        ConfigError: If it is not a number from 0 to 1.
    """
    if not _is_finite(strength) or not 0 <= strength <= 1:
        raise ConfigError(
            f"strength={short(strength)} cannot be used.",
            expected="a number from 0, the ViT as it was, to 1, as trained",
            got=short(strength),
        )
    return float(strength)


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of the arguments, resolved on first use, when circular imports are complete."""
    parameters = inspect.signature(function).parameters.values()
    single = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = _Names(vars(sys.modules[function.__module__]))
    hints = typing.get_type_hints(function, globalns=names)
    return {name: hints[name] for name in single if name in hints}


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(kind, TypeVar):
        kind = kind.__bound__ or Any
    kind, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind in (typing.Union, types.UnionType):
        # A string that names a path or a device has to be one that can.
        named = isinstance(value, str) and not _NAMED.isdisjoint(getattr(_plain(one), "__name__", "") for one in inner)
        return any(_is_of(value, one) for one in inner if one is not str or not named)
    if getattr(kind, "__module__", "") == "torch" and kind.__name__ == "device":
        return _is_device(value)
    if kind in _KINDS:
        return _KINDS[kind][1](value) and _entries_are_of(value, kind, inner)
    if not isinstance(kind, type):
        return True
    if typing_extensions.is_protocol(kind) and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(value, kind) and _entries_are_of(value, kind, inner)


def _entries_are_of(value: Any, kind: Any, inner: tuple[Any, ...]) -> bool:
    """Whether the entries of a collection are of the kinds in brackets; an array's first one; none of an iterator."""
    if not inner or kind is collections.abc.Callable:
        return True
    if isinstance(value, collections.abc.Mapping) and len(inner) == 2:
        return all(_is_of(key, inner[0]) and _is_of(entry, inner[1]) for key, entry in value.items())
    if kind is tuple and inner[1:] != (...,):
        return len(value) == len(inner) and all(map(_is_of, value, inner))
    if not isinstance(value, collections.abc.Collection):
        return True
    entries = value if isinstance(value, list | tuple | set | frozenset) else itertools.islice(value, 1)
    try:
        return all(_is_of(entry, inner[0]) for entry in entries)
    except TypeError:  # a tensor without axes
        return False


def _plain(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _told(kind: Any) -> str:
    """Name a kind in words."""
    plain, inner = _plain(kind), typing.get_args(kind)
    if isinstance(kind, TypeVar):
        return _told(kind.__bound__ or Any)
    if plain in (typing.Union, types.UnionType):
        return ", ".join(dict.fromkeys(map(_told, inner)))
    name = _KINDS[plain][0] if plain in _KINDS else getattr(plain, "__qualname__", str(plain))
    if not inner or plain in (collections.abc.Callable, os.PathLike):
        return name
    return f"{name} of {' and '.join(_told(one) for one in inner if one is not ...)}"


def short(value: Any) -> str:
    """Show a value in a message, cut where it is long.

    Args:
        value: Anything.
    """
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
