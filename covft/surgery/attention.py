"""Low-rank updates of the linear layers of attentions, beside adapted FFNs.

Hooks add them, so that each weight of the ViT keeps its name in every form in which models are saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.errors import UnsupportedViTError
from covft.surgery.linears import linear_layers
from covft.utils.sharding import partition_like, shape_of
from covft.utils.torch_internals import remove_hooks

UPDATE = "covft_update"
"""Attribute of a linear layer that holds its update."""
_SCALE = 2.0  # alpha / r of LoRA, at the defaults of `covft.tune(vit, "lora")`


class Update(nn.Module):
    r"""Add $2\, B A x$ to what a frozen linear layer makes of x: LoRA with $\alpha = 2 r$.

    $A$ (rank, in) starts as LoRA's does, $B$ (out, rank) at zero. Hu et al., arXiv 2106.09685.

    Args:
        in_features: Width of x.
        out_features: Width of the output.
        rank: Rank of the update.

    Attributes:
        strength: Factor of the update, from 0 to 1: `encoder.strength`.
    """

    strength = 1.0

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the update for tokens, in their type."""
        return _SCALE * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def add(self, linear: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Add it to the output of the linear layer; a forward hook of that."""
        if self.strength == 0 and not torch.is_grad_enabled():
            return output
        added = self(args[0]).to(output.dtype)
        if self.strength == 0:  # as in `dial.Beside.mix`: gradients of zeros, whatever is trained
            return torch.where(torch.zeros((), dtype=torch.bool, device=output.device), added, output)
        return output + (added if self.strength == 1 else self.strength * added)

    def weight(self) -> Tensor:
        """Return what it adds to the weight of the linear layer, shape (out, in)."""
        return _SCALE * (self.up @ self.down)

    def extra_repr(self) -> str:
        """Return the rank."""
        return f"rank={len(self.down)}"


def attention_layers(vit: nn.Module, spec: ViTSpec, layers: Iterable[int]) -> list[str]:
    """Return the paths of the linear layers of adapted blocks outside their FFNs.

    Args:
        vit: The ViT.
        spec: What is known of it.
        layers: Indices of the adapted blocks.

    Those whose weights the attention reads without a call (timm's BEiT, EVA, Swin v2) are left out.

    Raises:
        UnsupportedViTError: If there are none that an update can be added to, or peft has put adapters there.
    """
    blocks = tuple(dict.fromkeys(spec.blocks[layer].path for layer in layers))
    ffns = tuple(f"{path}." for block in spec.blocks for path in (block.mlp_path, block.output_path) if path)
    found = [
        path
        for path, module in linear_layers(vit, blocks)
        if isinstance(module, nn.Linear) and not f"{path}.".startswith(ffns)
    ]
    without = [path for path in blocks if not any(name.startswith(f"{path}.") for name in found)]
    if without:
        raise UnsupportedViTError(
            f"attention_rank adds to what linear layers return, and {without[0]} calls none outside its FFN.",
            expected="an attention that calls its projections",
            got=f"{spec}, whose attention passes its weights to a function",
            fix="attention_rank=None",
        )
    return found


def add_updates(vit: nn.Module, paths: Iterable[str], rank: int) -> None:
    """Add a trained update to linear layers.

    Args:
        vit: The ViT.
        paths: Paths of the layers.
        rank: Rank of the updates.
    """
    for path in paths:
        linear: Any = vit.get_submodule(path)
        update = _update_of(linear, rank).to(linear.weight.device, linear.weight.dtype)
        update._is_hf_initialized = True  # type: ignore[assignment]
        partition_like(linear.parameters(), update)
        linear.add_module(UPDATE, update)
        linear.register_forward_hook(update.add)


def expected_updates(vit: nn.Module, paths: Iterable[str], rank: int) -> dict[str, Tensor]:
    """Return what `add_updates` would add, by name, without values."""
    with torch.device("meta"):
        updates = {path: _update_of(vit.get_submodule(path), rank) for path in paths}
    return {
        f"{path}.{UPDATE}.{name}": tensor
        for path, update in updates.items()
        for name, tensor in update.named_parameters()
    }


def remove_updates(vit: nn.Module) -> None:
    """Undo `add_updates`."""
    for module in list(vit.modules()):
        if UPDATE in module._modules:
            remove_hooks(module, lambda owner: isinstance(owner, Update))
            del module._modules[UPDATE]


def updates_of(vit: nn.Module) -> dict[str, Update]:
    """Return the updates, by the paths of the linear layers that have them."""
    found: dict[str, Any] = {path: module._modules.get(UPDATE) for path, module in vit.named_modules()}
    return {path: update for path, update in found.items() if update is not None}


def updated_layers(vit: nn.Module) -> list[str]:
    """Return the paths of the linear layers that have updates."""
    return list(updates_of(vit))


def is_update(name: str) -> bool:
    """Return whether a parameter or tensor is an update's.

    Args:
        name: Its dotted name.
    """
    return UPDATE in name.split(".")


def _update_of(linear: Any, rank: int) -> Update:
    out_features, in_features = shape_of(linear.weight)
    return Update(in_features, out_features, rank)
