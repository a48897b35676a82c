"""Arguments are checked against annotations: every kind that covft's functions have, good and bad values."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from covft.errors import ArgumentError
from covft.utils.arguments import check_kinds

Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class Store(Protocol):
    def open(self, name: str) -> Any: ...


class Bag:
    def open(self, name: str) -> Any: ...


class Untestable(Protocol):
    def anything(self) -> Any: ...


def numbers(whole: int = 1, real: float = 1.0, flag: bool = True, maybe: int | None = None) -> tuple[Any, ...]:
    return whole, real, flag, maybe


def texts(text: str = "", path: str | Path = ".", other: str | os.PathLike[str] | None = None) -> tuple[Any, ...]:
    return text, path, other


def devices(device: torch.device | str | None = None) -> tuple[Any, ...]:
    return (device,)


def collections(
    names: Sequence[str] = (), either: str | Sequence[str] = "", items: Iterable[str] = (), by: Mapping[str, int] = {}
) -> tuple[Any, ...]:
    return names, either, items, by


def tuples(pair: tuple[int, int] = (1, 1), many: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    return pair, many


def objects(
    model: Model | None = None,  # type: ignore[valid-type]
    tensor: Tensor | None = None,
    store: Store | None = None,
    free: Untestable | None = None,
    call: Callable[[int], int] = abs,
    whatever: Any = None,
) -> tuple[Any, ...]:
    return model, tensor, store, free, call, whatever


GOOD = [
    (numbers, {"whole": np.int64(3), "real": 2, "flag": False, "maybe": None}),
    (numbers, {"whole": torch.tensor(3), "real": np.float32(0.5), "maybe": 4}),
    (texts, {"text": "a\0b", "path": Path("x"), "other": None}),
    (texts, {"text": "", "path": "x", "other": "y"}),
    (collections, {"names": ["a"], "either": ["a"], "items": {"a"}, "by": {"a": 1}}),
    (collections, {"names": ("a",), "either": "a", "items": iter("ab"), "by": {}}),
    (devices, {"device": "cpu"}),
    (devices, {"device": torch.device("meta")}),
    (devices, {"device": None}),
    (tuples, {"pair": (1, 2), "many": (1, 2, 3)}),
    (tuples, {"many": ()}),
    (objects, {"model": nn.Linear(1, 1), "tensor": torch.ones(1), "store": Bag(), "free": 3, "call": max}),
    (objects, {"whatever": object()}),
]
BAD = [
    (numbers, "whole", [True, 2.5, "3", None, torch.ones(2), [3]]),
    (numbers, "real", [True, "2.5", None, float("nan"), float("inf"), 2j]),
    (numbers, "flag", [0, 1, "False", None]),
    (numbers, "maybe", ["3", 2.5, False]),
    (texts, "text", [None, 3, b"x", Path("x")]),
    (texts, "path", [None, 3, b"x", "", "a\0b", ["x"]]),
    (texts, "other", [3, "", "a\0b"]),
    (collections, "names", ["ab", {"a"}, {"a": 1}, ["a", 1], 3, None, list]),
    (collections, "either", [3, ["a", None], {"a"}]),
    (collections, "items", ["ab", 3, list, [1]]),
    (collections, "by", [[], {1: 1}, {"a": "b"}]),
    (devices, "device", ["nowhere", "", 3, True]),
    (tuples, "pair", [(1,), (1, 2, 3), [1, 2], (1, "2"), (1, True)]),
    (tuples, "many", [(1, None), [1], "12"]),
    (objects, "model", [3, "x", Bag()]),
    (objects, "tensor", [3, [1.0], np.ones(2)]),
    (objects, "store", [3, "x", nn.Linear(1, 1)]),
    (objects, "call", [3, None, "x"]),
]


@pytest.mark.parametrize(("function", "given"), GOOD)
def test_good_kinds_arrive_unchanged(function, given):
    found = check_kinds(function)(**given)
    for name, value in zip(inspect.signature(function).parameters, found, strict=True):
        assert name not in given or value is given[name]


@pytest.mark.parametrize(
    ("function", "name", "value"), [(function, name, value) for function, name, values in BAD for value in values]
)
def test_bad_kinds_are_refused_by_name(function, name, value):
    with pytest.raises(ArgumentError, match=rf"^{function.__name__}\(\) cannot use {name}=") as error:
        check_kinds(function)(**{name: value})
    assert isinstance(error.value, TypeError)
    assert error.value.expected
    assert error.value.got == type(value).__name__


def test_what_is_expected_is_told_in_words():
    with pytest.raises(ArgumentError) as error:
        check_kinds(collections)(names=3)
    assert error.value.expected == "a list or tuple of a string"
    with pytest.raises(ArgumentError) as error:
        check_kinds(texts)(path=3)
    assert error.value.expected == "a string, a path"


def test_a_refused_call_does_not_run():
    ran = []

    @check_kinds
    def function(number: int) -> None:
        ran.append(number)

    with pytest.raises(ArgumentError):
        function("x")
    function(1)
    assert ran == [1]


def test_positional_arguments_methods_and_defaults():
    class Thing:
        @check_kinds
        def method(self, number: int = "default") -> int:  # type: ignore[assignment]
            return number

        @classmethod
        @check_kinds
        def make(cls, number: int) -> int:
            return number

    assert Thing().method() == "default"  # a default is the function's own affair
    assert Thing().method(2) == Thing.make(2) == 2
    with pytest.raises(ArgumentError, match=r"^method\(\) cannot use number='x'"):
        Thing().method("x")
    with pytest.raises(ArgumentError, match=r"^make\(\)"):
        Thing.make("x")


def test_dataclasses_are_named_by_their_class():
    @check_kinds
    @dataclasses.dataclass(frozen=True)
    class Point:
        x: int = 0

    assert Point(3).x == 3
    with pytest.raises(ArgumentError, match=r"Point\(\) cannot use x='3'"):
        Point("3")  # type: ignore[arg-type]


def test_unknown_and_missing_names_stay_with_python():
    checked = check_kinds(lambda number: number)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        checked()
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        checked(number=1, other=2)


def test_signature_and_docstring_are_kept():
    checked = check_kinds(numbers)
    assert inspect.signature(checked) == inspect.signature(numbers)
    assert checked.__name__ == "numbers"


def test_iterators_are_not_consumed():
    @check_kinds
    def function(items: Iterable[int]) -> list[int]:
        return list(items)

    def three() -> Iterator[int]:
        yield from (1, 2, 3)

    assert function(three()) == [1, 2, 3]
