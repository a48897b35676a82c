"""The fields of `CoVFTConfig` as command-line options."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from covft.config import MOST_BLOCKS, CoVFTConfig
from covft.errors import ConfigError
from covft.utils.arguments import check_kinds, short


class Option(NamedTuple):
    """A field of `CoVFTConfig` on a command line: `choices` is empty for other than words, `help` is one sentence."""

    name: str
    parse: Callable[[str], Any]
    choices: tuple[str, ...]
    default: Any
    help: str

    @property
    def is_plain(self) -> bool:
        """Whether a parser of command lines reads it: a number or a word."""
        return self.parse in (int, float, str)


def options(without: Collection[str] = ()) -> Iterator[Option]:
    """Yield every field as an option, but for those `without`."""
    hints, meanings = typing.get_type_hints(CoVFTConfig), _meanings()
    for field in dataclasses.fields(CoVFTConfig):
        if field.name in without:
            continue
        kinds = [kind for kind in (hints[field.name], *typing.get_args(hints[field.name])) if kind in _PARSERS]
        parse = parse_layers if field.name == "layers" else _PARSERS[kinds[0]]
        yield Option(field.name, parse, field.metadata["choices"], field.default, meanings.get(field.name, ""))


@check_kinds
def add_options(parser: argparse.ArgumentParser, prefix: str = "", without: Collection[str] = ()) -> None:
    """Add every field to an argument parser as `--PREFIXname`, but for those `without`; see `given_options`."""
    for option in options(without):
        default = "" if option.default is None else f" (default: {option.default})"
        parser.add_argument(
            f"--{prefix}{option.name}",
            type=option.parse if option.is_plain else str,
            default=argparse.SUPPRESS,  # choices are checked by CoVFTConfig, whose error says more
            metavar="|".join(option.choices) or _SHOWN.get(option.parse, "N"),
            help=option.help.replace("%", "%%") + default,
        )


def given_options(*namespaces: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """Return the settings that were given on a command line, by field; a later namespace overrides an earlier one.

    Raises:
        ConfigError: If the layers or a switch cannot be read.
    """
    names = {f"{prefix}{field.name}": field.name for field in dataclasses.fields(CoVFTConfig)}
    found = {names[key]: value for space in namespaces for key, value in vars(space).items() if key in names}
    return read_options(found)


def read_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose texts are read: layers and switches, which parsers leave as they were typed.

    Raises:
        ConfigError: If one cannot be read.
    """
    parsers = {option.name: option.parse for option in options() if not option.is_plain}
    return {
        name: parsers[name](value) if name in parsers and isinstance(value, str) else value
        for name, value in given.items()
    }


def parse_switch(text: str) -> bool:
    """Read `true` or `false`.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> parse_switch("True")
        True
    """
    switches = {"true": True, "false": False}
    if text.lower() not in switches:
        raise ConfigError(f"The switch {short(text)} cannot be read.", expected="true or false", got=short(text))
    return switches[text.lower()]


def parse_layers(text: str) -> tuple[int, ...]:
    """Read block indices: `11-22` (both ends included), `3,5,-2`, and mixtures.

    Spans have no negative ends: `-2-5` could mean two things.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> parse_layers("3,11-13,-2")
        (3, 11, 12, 13, -2)
    """
    indices: list[int] = []
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"(-?\d{1,9})|(\d{1,9})-(\d{1,9})", part)
        span = range(0)
        if found:
            single, first, last = found.groups()
            span = range(int(single), int(single) + 1) if single else range(int(first), int(last) + 1)
        if not 0 < len(span) <= MOST_BLOCKS:
            raise ConfigError(
                f"layers {text!r} cannot be read.",
                expected="indices, and spans of indices that are not negative, both ends included",
                got=repr(part),
                fix="11-22, or 3,5,-2 (as --layers=-2,3 where the first is negative)",
            )
        indices += span
    return tuple(indices)


_PARSERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, str: str, bool: parse_switch}
_SHOWN: dict[Callable[[str], Any], str] = {parse_layers: "11-22", parse_switch: "true|false"}


def _meanings() -> dict[str, str]:
    """Return the first sentence about each field from the docstring of `CoVFTConfig`."""
    section = (inspect.getdoc(CoVFTConfig) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: re.split(r"(?<=\.)\s", " ".join(text.split()))[0].replace("`", "") for name, text in entries}


@check_kinds
def method_options(method: str, settings: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """Return the options of a tuning method that a command line gives.

    Args:
        method: Name of the method.
        settings: Settings of covft that were given, each by an option of its own.
        given: Options of another method, such as `r=16` or `layers=11-22`: numbers, lists and switches as JSON, blocks
            also as `parse_layers` reads them, all else as text.

    Raises:
        ConfigError: If an option has no value, or settings and options belong to another method.
    """
    given = list(given)
    if method == "covft" and given:
        raise ConfigError(
            f"{', '.join(given)} cannot be options of covft, whose settings have command-line options of their own.",
            expected="another method, such as lora with r=16",
            got="covft",
        )
    if method != "covft" and settings:
        raise ConfigError(
            f"{', '.join(settings)} are settings of covft, not of {method!r}.",
            expected="an option NAME=VALUE of the method",
            got=", ".join(f"{name}={value!r}" for name, value in settings.items()),
        )
    found = dict(settings)
    for entry in given:
        name, mark, value = entry.partition("=")
        if not mark or not name:
            raise ConfigError(f"The option {entry!r} has no value.", expected="NAME=VALUE", got=entry, fix="r=16")
        found[name.replace("-", "_")] = _option_value(name, value)
    return found


def _option_value(name: str, value: str) -> Any:
    if name == "layers" and re.fullmatch(r"[-\d,\s]+", value):  # as those of covft
        return list(parse_layers(value))
    try:
        return json.loads(value)
    except ValueError:
        return value
