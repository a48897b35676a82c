"""Counts parameters and groups them for optimizers, whole or sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from covft.utils.sharding import shape_of


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers parameters hold, over all processes.

    Args:
        parameters: Any parameters; those that ZeRO-3 partitioned count by their full shape.
    """
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
    """Group trained parameters for an optimizer: one group per part, with and without decay.

    Args:
        named: Parameters by name; those that are not trained are left out.
        part_of: The part that a name belongs to.
        lr: Learning rate of every part without a rate of its own.
        rates: Learning rate of each part; None or missing takes `lr`.
        weight_decay: Weight decay of the matrices; vectors and scalars have none.
        decayed: Names that may be decayed; None is all.
        order: Parts in the order of their groups; None of them named keeps the order of `named`.

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
