"""Bytes that autograd keeps of a forward, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FlashLike(torch.autograd.Function):
    """Attention that keeps what flash attention keeps, and computes nothing: for tensors without values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return something of the output's shape."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients without values."""
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return FlashLike.apply(query, key, value).transpose(1, 2), None


def use_flash_like(config: Any) -> None:
    """Let models that are built from this config attend as `FlashLike`."""
    from transformers import AttentionInterface

    AttentionInterface.register("counted", _attend)
    config._attn_implementation = "counted"
    for name in ("vision_config", "text_config"):
        if hasattr(config, name):
            getattr(config, name)._attn_implementation = "counted"


def kept(function: Callable[[], Any], model: nn.Module) -> int:
    """Return the bytes that autograd keeps of a function, without the model's own weights."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(storage.nbytes() for storage in found.values())
