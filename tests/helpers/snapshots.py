"""Everything of a module that a refused or undone change must leave as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Record a module; `values` are copies, all other parts compare with `==`."""
    hooks = {name: [len(getattr(part, table)) for table in _HOOKS] for name, part in module.named_modules()}
    return {
        "values": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "classes": {name: type(part) for name, part in module.named_modules()},
        "modules": {name: id(part) for name, part in module.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in module.named_parameters()},
        "trainable": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "training": {name: part.training for name, part in module.named_modules()},
        "hooks": hooks,
        "own_hooks": hooks[""],
        "attributes": sorted(vars(module)),
    }


def assert_unchanged(module: nn.Module, before: dict[str, Any], without: Iterable[str] = ()) -> None:
    """Compare a module with its snapshot.

    Args:
        module: The module.
        before: What `snapshot` returned.
        without: Parts that may differ, such as the hooks that transformers installs in the first call.
    """
    after = snapshot(module)
    assert after["values"].keys() == before["values"].keys()
    for name, tensor in before["values"].items():
        assert torch.equal(after["values"][name], tensor), name
    for part in before.keys() - {"values", *without}:
        assert after[part] == before[part], part


def aligned(module: nn.Module) -> nn.Module:
    """Copy the weights of a module that was loaded, and return it.

    Weights mapped from a file begin at any byte, and kernels of some CPUs then add in another order.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
