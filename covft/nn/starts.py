"""Starts that keep experts apart: noise on their matrices, or units that are drawn anew.

Everything is drawn on the CPU in float64, by a generator of its own for each expert and tensor, and then cast: the same
seed gives the same start on every device and process, whatever the state of torch's generators, which is not changed.
Between kinds of CPUs, the last bit of a float64 may differ before it is cast.

Shapes: F ffn_dim, Q rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from covft.errors import UnsupportedViTError
from covft.nn.experts import Experts
from covft.nn.low_rank import LowRankDifference, LowRankExperts


@torch.no_grad()
def start_apart(experts: Experts | LowRankExperts, kind: str, scale: float, *, seed: int, layer: int) -> None:
    """Change experts that are equal so that they differ from the start.

    Args:
        experts: New experts; on the meta device there is nothing to change.
        kind: `"upcycled"` changes nothing. `"noise"` adds Gaussian noise to every matrix, of `scale` times its standard
            deviation; experts of low rank start from noise of that size in their products. `"drop"` draws a share
            `scale` of the units anew.
        scale: Relative standard deviation, or share.
        seed: Seed of the start.
        layer: Index of the block, each of which gets other draws.

    Raises:
        UnsupportedViTError: If units were to be drawn anew, and what a unit is cannot be told.
    """
    if kind == "upcycled":
        return
    key = (seed, layer)
    if isinstance(experts, LowRankExperts):
        _add_low_rank_noise(experts, scale, key)
    elif kind == "noise":
        _add_noise(experts, scale, key)
    else:
        _drop_units(experts, scale, key)


def _add_noise(experts: Experts, scale: float, key: tuple[int, ...]) -> None:
    for number, expert in enumerate(experts):
        for name, matrix in expert.named_parameters():
            if matrix.dim() > 1 and matrix.is_floating_point() and not matrix.is_meta:
                before = _wide(matrix)
                noise = _normal(before.shape, _generator(*key, number, name))
                matrix.copy_(before + scale * before.std(correction=0) * noise)


def _drop_units(experts: Experts, share: float, key: tuple[int, ...]) -> None:
    """Draw units anew: rows of the first matrices with their biases, and the columns of the last one.

    Each of these gets the mean and the standard deviation of what it replaces.
    """
    plan = experts.plan
    if plan is None:
        raise UnsupportedViTError(
            f"expert_init='drop' cannot tell the units of {type(experts.prototype).__name__}: "
            f"{experts.unfused_reason}.",
            expected="an FFN of the form linear, activation, linear, or a gated one",
            got=type(experts.prototype).__name__,
            fix="expert_init='noise'",
        )
    for number, expert in enumerate(experts):
        *first, last = plan.layers(expert)
        width = last.in_features
        units_F = torch.randperm(width, generator=_generator(*key, number, "units"), device="cpu")
        units = units_F[: max(1, round(share * width))]
        for place, layer in enumerate(first):
            # One layer of twice the width has both halves of a gated unit.
            rows = torch.cat([units + start for start in range(0, layer.out_features, width)])
            for name, tensor in layer.named_parameters():
                _redraw(tensor, (rows,), _generator(*key, number, f"{place}.{name}"))
        _redraw(last.weight, (slice(None), units), _generator(*key, number, "last.weight"))


def _redraw(tensor: Tensor, where: tuple, generator: torch.Generator) -> None:
    if tensor.is_meta:
        return
    values = _wide(tensor)
    old = values[where]
    values[where] = old.mean() + old.std(correction=0) * _normal(old.shape, generator)
    tensor.copy_(values)


def _add_low_rank_noise(experts: LowRankExperts, scale: float, key: tuple[int, ...]) -> None:
    """Draw both factors, so that the entries of their product have the standard deviation of the noise."""
    layers: Iterable[nn.Linear] = experts.plan.layers(experts.shared)
    for place, (layer, difference) in enumerate(zip(layers, experts.differences, strict=True)):
        difference = cast(LowRankDifference, difference)
        if difference.down.is_meta:
            continue
        rank, width = difference.down.shape[1:]
        spread = _wide(layer.weight).std(correction=0)
        for number in range(len(experts)):
            down, up = difference.down[number], difference.up[number]
            down_QF = _normal(down.shape, _generator(*key, number, f"{place}.down")) / math.sqrt(width)
            down.copy_(down_QF)
            up.copy_(
                _normal(up.shape, _generator(*key, number, f"{place}.up")) * scale * spread * math.sqrt(width / rank)
            )


def _wide(tensor: Tensor) -> Tensor:
    """Return a copy in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _generator(*key: int | str) -> torch.Generator:
    """Return a generator whose seed is a digest of the key, so that no two keys share draws."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
