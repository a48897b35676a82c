"""Finds the linear layers inside blocks that can be given updates."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from covft.errors import UnsupportedViTError
from covft.utils.peft import is_adapter


def linear_layers(vit: nn.Module, blocks: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers inside some blocks, 1 x 1 convolutions too, and attentions without linear layers.

    Args:
        vit: The ViT.
        blocks: Paths of blocks.

    Raises:
        UnsupportedViTError: If peft has put adapters there.
    """
    inside = tuple(f"{path}." for path in blocks)
    taken: tuple[str, ...] = ()
    for path, module in vit.named_modules():
        if not path.startswith(inside) or (taken and path.startswith(taken)):
            continue
        if isinstance(module, nn.MultiheadAttention):
            taken += (f"{path}.",)
            if module.in_proj_weight is not None:
                yield path, module
        elif is_adapter(module):
            raise UnsupportedViTError(
                f"{path} has adapters of peft already.", expected="a ViT without adapters", fix="peft_model.unload()"
            )
        elif (type(module).__name__ in ("Linear", "Conv1D") or _is_pointwise(module)) and _is_called(vit, path):
            yield path, module


def _is_called(vit: nn.Module, path: str) -> bool:
    """Return whether the module around a layer calls it, and does not pass its weight to a function."""
    parent, _, name = path.rpartition(".")
    around = vit.get_submodule(parent)
    if getattr(around, "q_bias", None) is None or getattr(around, "qkv_bias_separate", False):
        return True
    return f"self.{name}.weight" not in inspect.getsource(type(around).forward)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
