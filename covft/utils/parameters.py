"""Counts parameters and groups them for optimizers, sharded or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from covft.utils.sharding import shape_of


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers parameters hold over all processes, with the full shape of ZeRO-3's."""
    return sum(math.prod(shape_of(parameter)) for parameter in parameters)


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    part_of: Callable[[str], str],
    *,
    lr: float,
    rates: Mapping[str, float | None],
    weight_decay: float,
    decayed: Collection[str] | None = None,
    order: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Group trained parameters for an optimizer: one group per part, with and without weight decay.

    Args:
        named: Parameters by name; frozen ones are left out.
        part_of: Returns the part of a name.
        lr: Learning rate of the parts that `rates` has no number for.
        rates: Learning rate of each part, or None.
        weight_decay: Weight decay of the matrices; vectors and scalars have none.
        decayed: Names that may be decayed; None is all.
        order: Order of the parts' groups; empty keeps the order of `named`.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and `name`; every trained parameter is in exactly one.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), len(shape_of(parameter)) > 1 and (decayed is None or name in decayed)
        rate = rates.get(part)
        group = {
            "params": [],
            "lr": lr if rate is None else rate,
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{part}/{'decay' if decays else 'no_decay'}",
        }
        groups.setdefault((part, decays), group)["params"].append(parameter)
    if order:
        return [groups[key] for key in sorted(groups, key=lambda key: (order.index(key[0]), not key[1]))]
    return list(groups.values())
