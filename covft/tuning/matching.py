"""The options by which methods train the same number of parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from covft.adapters.registry import describe
from covft.errors import ConfigError, CoVFTError
from covft.tuning.api import COVFT, tune
from covft.tuning.budget import twin_of
from covft.tuning.method import Tower
from covft.tuning.registry import make_method, methods
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.parameters import count

_MOST = 1 << 16
_STEPS = 65  # a width may have to be a multiple of the number of heads
_SECANTS = 8  # steps of the search before it only halves


@dataclass(frozen=True)
class Match:
    """The options by which a method comes closest to a number of trained parameters.

    `covft.budget(vit, found.method, **found.options)` says what else that costs; `print(found)` states the difference.

    Attributes:
        method: Name of the method.
        options: Its options, with the size that was found.
        parameters: What it trains with them.
        wanted: The number to come close to.
    """

    method: str
    options: dict[str, Any]
    parameters: int
    wanted: int

    @property
    def difference(self) -> int:
        """How many parameters more than wanted are trained; negative if fewer."""
        return self.parameters - self.wanted

    @property
    def relative(self) -> float:
        """The difference as a share of what was wanted."""
        return self.difference / self.wanted

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        told = f"{self.method}({options}): {self.parameters:,} trained"
        return f"{told}, {self.difference:+,} ({self.relative:+.2%}) from {self.wanted:,}"


@check_kinds
def match(
    vit: nn.Module,
    parameters: int,
    methods: Iterable[str],
    *,
    text_dim: int = 768,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    sizes: Mapping[str, str] | None = None,
) -> list[Match]:
    """Find the options by which methods come closest to a number of trained parameters.

    One option of each method is chosen, its size: the rank of LoRA, the number of prompts or of blocks, the width of a
    network, or the rank of covft's experts. What is trained has to grow with it.

    Args:
        vit: The ViT, which is not changed.
        parameters: Number of trained parameters to come close to.
        methods: Names of methods.
        text_dim: Width C of the text features, for methods that read text.
        options: Other options of each method, by its name.
        sizes: Another option to choose, by the method's name, such as `{"covft": "experts"}`; `"layers"` is a number of
            blocks, the last ones without the very last.

    Returns:
        For each method, in order, its options and how far they are from `parameters`: far where it cannot come closer.

    Raises:
        ConfigError: If a method has no size to choose, or `options` set it already.
        CoVFTError: As `covft.tune` does.

    Example:
        >>> import timm
        >>> [found] = match(timm.create_model("test_vit"), 20_000, ["lora"])
        >>> print(found)
        lora(r=4): 21,504 trained, +1,504 (+7.52%) from 20,000
    """
    check_sizes(text_dim=text_dim)
    if parameters < 1:
        raise ConfigError(f"parameters={parameters} leaves nothing to train.", expected="at least 1", got=parameters)
    twin = twin_of(vit)
    found = []
    for name in methods:
        given = dict((options or {}).get(name, {}))
        size, value_of = _size(twin, name, (sizes or {}).get(name))
        if size in given:
            raise ConfigError(
                f"The options of {name!r} set {size}, which is to be found.",
                expected="other options alone",
                got=f"{size}={given[size]!r}",
                fix='sizes={...} to find another option of the method, such as "layers"',
            )
        number, trained = _closest(_counter(twin, name, given, size, value_of, text_dim), parameters)
        found.append(Match(name, {**given, size: value_of(number)}, trained, parameters))
    return found


def _counter(
    twin: nn.Module, method: str, options: dict[str, Any], size: str, value_of: Callable[[int], Any], text_dim: int
) -> Callable[[int], int]:
    """Return a function from a size to the number of parameters that are trained; it raises as `tune` does."""
    tower = Tower(twin, describe(twin), describe(twin).depth - 1)

    @functools.cache
    def trained(number: int) -> int:
        given = {**options, size: value_of(number)}
        with torch.device("meta"):
            if method == COVFT:
                tuned: Any = tune(copy.deepcopy(twin), method, text_encoder=text_dim, **given)
                return count(tuned.trainable_parameters())
            chosen = make_method(method, given)
            plan = chosen.plan(tower._replace(text_dim=text_dim if chosen.needs_text else None))
        own = dict(twin.named_parameters())
        new = (parameter for _, parameter in plan.new_parameters() if parameter.requires_grad)
        return count([own[name] for name in plan.trained]) + count(new)

    return trained


def _closest(trained: Callable[[int], int], wanted: int) -> tuple[int, int]:
    """Return the size that trains a number that is closest to the wanted one, and that number.

    A method's count mostly is linear in its size, which the secant then meets at once.
    """
    step = next((step for step in range(1, _STEPS) if _works(trained, step)), None)
    if step is None:
        trained(1)  # whose error says what is wrong
    assert step is not None, "or that would have raised"
    known = {1: trained(step)}  # by multiples of the step
    low, high = 1, _MOST // step  # trains too little or enough; trains too much, or does not work
    guess, secants = 2, 0
    while high - low > 1 and known[1] < wanted:
        if _works(trained, guess * step):
            known[guess] = trained(guess * step)
        low, high = (guess, high) if known.get(guess, wanted + 1) <= wanted else (low, guess)
        one, other = sorted(known, key=lambda number: abs(known[number] - wanted))[:2] if len(known) > 1 else (1, 1)
        secants += 1
        guess = (low + high) // 2
        if secants <= _SECANTS and known[one] != known[other]:
            line = one + (wanted - known[one]) * (other - one) // (known[other] - known[one])
            guess = max(line, low + 1) if line < high else guess
    best = min((number for number in (low, high) if number in known), key=lambda n: abs(known[n] - wanted))
    return best * step, known[best]


def _works(trained: Callable[[int], int], number: int) -> bool:
    """Return whether a size can be used: a width may have to be a multiple of something, a ViT has so many blocks."""
    try:
        trained(number)
    except CoVFTError:
        return False
    return True


def _size(vit: nn.Module, method: str, asked: str | None) -> tuple[str, Callable[[int], Any]]:
    """Return the option that sets how much a method trains, and its value for a number."""
    known = methods()
    size = asked or ("expert_rank" if method == COVFT else known[method].size if method in known else None)
    if size is None:
        if method not in known:
            make_method(method, {})  # whose error names the closest
        raise ConfigError(
            f"{method!r} has no option that sets how much is trained.",
            known=", ".join([COVFT, *(name for name, each in known.items() if each.size)]),
        )
    if size != "layers":
        return size, lambda number: number
    depth = describe(vit).depth

    def last(number: int) -> tuple[int, ...]:
        """Return that many blocks."""
        if number >= depth:
            return tuple(range(number))  # too many are an error
        return tuple(range(depth - 1 - number, depth - 1))

    return size, last
