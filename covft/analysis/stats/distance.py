"""How far two towers have come apart, block by block: the paper's Fig. 1c."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.registry import describe
from covft.errors import ShapeError
from covft.surgery.adapted import AdaptedViT
from covft.utils.arguments import check_kinds, short

_NUMBERED = re.compile(r"^(.*?\.?\d+)(?:\.|$)")
_REST = ""


@dataclass(frozen=True)
class BlockDistance:
    """How far the weights of one block are apart.

    Attributes:
        distance: L2 distance of the two towers' weights.
        relative: That distance, divided by the norm of the weights at the start, or else of the first tower's.
        cosine: Cosine of the two changes since the start; None without a start, or where one has not changed.
        parameters: Number of weights.
    """

    distance: float
    relative: float
    cosine: float | None
    parameters: int


@dataclass(frozen=True)
class ParameterDistance:
    """How far two towers are apart.

    Attributes:
        blocks: By path of the block, in the order of the weights; `""` is everything outside the blocks.
        total: Of all weights.
    """

    blocks: dict[str, BlockDistance]
    total: BlockDistance


@check_kinds
def parameter_distance(
    first: nn.Module | Mapping[str, Tensor],
    second: nn.Module | Mapping[str, Tensor],
    start: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    blocks: Iterable[str] | None = None,
) -> ParameterDistance:
    """Measure how far two towers have come apart, block by block.

    For a curve over training, call it for each pair of checkpoints. Tensors are compared one by one in float64, so no
    copy of a tower is made.

    Args:
        first: A tower, or its `state_dict()`.
        second: A tower with the same tensors.
        start: What both were trained from; gives the cosine of the two changes.
        blocks: Paths of the blocks, such as `["blocks.0", "blocks.1"]`; None takes them from the description of a
            ViT, and from names otherwise: what is before the first number.

    Raises:
        ShapeError: If the tensors differ in name or shape.

    Example:
        >>> one, two = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> list(parameter_distance(one, two).blocks)
        ['0']
    """
    prefixes = _prefixes(first) if blocks is None else tuple(blocks)
    a, b = _tensors(first), _tensors(second)
    s = None if start is None else _tensors(start)
    for name, other in (("second", b), *((("start", s),) if s is not None else ())):
        _check_same(a, other, name)
    sums: dict[str, _Sums] = {}
    for name, tensor in a.items():
        block = _block_of(name, prefixes)
        sums.setdefault(block, _Sums()).add(tensor, b[name], None if s is None else s[name])
    total = _Sums()
    for one in sums.values():
        total.include(one)
    return ParameterDistance({block: one.result() for block, one in sums.items()}, total.result())


class _Sums:
    """Sums of squares and products of differences."""

    def __init__(self) -> None:
        self.apart = self.size = self.first = self.second = self.product = 0.0
        self.parameters = 0

    def add(self, first: Tensor, second: Tensor, start: Tensor | None) -> None:
        a, b = first.detach().double(), second.detach().double().to(first.device)
        self.parameters += a.numel()
        self.apart += float((a - b).square().sum())
        if start is None:
            self.size += float(a.square().sum())
            return
        s = start.detach().double().to(first.device)
        self.size += float(s.square().sum())
        self.first += float((a - s).square().sum())
        self.second += float((b - s).square().sum())
        self.product += float(((a - s) * (b - s)).sum())

    def include(self, other: _Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def result(self) -> BlockDistance:
        changes = math.sqrt(self.first * self.second)
        distance = math.sqrt(self.apart)
        return BlockDistance(
            distance=distance,
            relative=distance / math.sqrt(self.size) if self.size else math.inf if distance else 0.0,
            cosine=self.product / changes if changes else None,
            parameters=self.parameters,
        )


def _tensors(tower: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: Mapping[str, Any] = tower if isinstance(tower, Mapping) else _plain(tower).state_dict()
    return {name: value for name, value in state.items() if torch.is_tensor(value) and value.is_floating_point()}


def _plain(tower: nn.Module) -> Any:
    return tower.vit if isinstance(tower, AdaptedViT) else tower


def _prefixes(tower: nn.Module | Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the paths of a ViT's blocks; none where it is not known."""
    if isinstance(tower, Mapping):
        return ()
    if isinstance(tower, AdaptedViT):
        spec = tower.spec
    else:
        try:
            spec = describe(tower)
        except LookupError:  # not a ViT that covft knows: by names
            return ()
    return tuple(dict.fromkeys(block.path for block in spec.blocks))


def _block_of(name: str, prefixes: tuple[str, ...]) -> str:
    if prefixes:
        return next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), _REST)
    found = _NUMBERED.match(name)
    return found[1] if found else _REST


def _check_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> None:
    if missing := sorted(set(a) ^ set(b)):
        raise ShapeError(
            "The towers have other tensors.",
            expected=f"in {name} the {len(a)} of first",
            got=f"{len(missing)} of only one of them, such as {missing[0]}",
            fix="compare towers of one method, or covft.merge them first",
        )
    wrong = [key for key, value in a.items() if value.shape != b[key].shape]
    if wrong:
        raise ShapeError(
            f"{wrong[0]} has another shape in {name}.",
            expected=short(tuple(a[wrong[0]].shape)),
            got=short(tuple(b[wrong[0]].shape)),
        )
