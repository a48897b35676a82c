"""Keeps what is trained in a ViT of half precision in float32, as optimizers need it.

AdamW's steps are about as large as the learning rate. Between 1/64 and 1/32, where many weights are, bfloat16 has steps
of 1.2e-4: at a learning rate of 2e-5 the sum is rounded back to the old weight, and nothing is learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from covft.nn.functional import HALF
from covft.surgery.overrides import Override
from covft.surgery.wrapped import WrappedViT
from covft.utils.sharding import is_sharded


class WideNorm(Override):
    """Overrides the forward of a norm in float32: tokens in half precision come back in their own type."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise in the type of the weights."""
        weight = next(self.owner.parameters(recurse=False), None)
        if weight is None or x.dtype not in HALF or weight.dtype != torch.float32:
            return self.inner(x, *args, **kwargs)
        return self.inner(x.float(), *args, **kwargs).to(x.dtype)


def widen(encoder: WrappedViT) -> int:
    """Cast what is trained of experts, routers, contexts and norms from half precision to float32.

    Call it before the optimizer is created. The rest of the ViT keeps its type, and so do its tokens: an adapted FFN
    computes in the type of its tokens, a norm in float32. Sharded parameters are left as they are.

    Args:
        encoder: The wrapped ViT.

    Returns:
        Number of parameters that were cast.
    """
    norms: set[str] = set()
    count = 0
    for name, parameter in encoder.adapted_parameters().items():
        if not parameter.requires_grad or parameter.dtype not in HALF or is_sharded(parameter):
            continue
        parameter.data = parameter.data.float()
        count += 1
        if encoder.part_of(name) == "norms":
            norms.add(name.rpartition(".")[0])
    for path in sorted(norms):
        norm = encoder.vit.get_submodule(path)
        for parameter in norm.parameters(recurse=False):
            if parameter.dtype in HALF:  # one that is frozen; torch's norms want a single type
                parameter.data = parameter.data.float()
        if not isinstance(norm.__dict__.get("forward"), WideNorm):
            WideNorm(norm, "forward").install()
    if count:
        encoder.original.widened = True
    return count


def remove_wide_norms(vit: nn.Module) -> None:
    """Take the overrides of the norms off a ViT."""
    for module in vit.modules():
        override = module.__dict__.get("forward")
        if isinstance(override, WideNorm):
            override.remove()
