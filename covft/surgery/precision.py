"""Keeps what is trained in a ViT of half precision in float32, as optimizers need it.

AdamW's steps are about as large as the learning rate. Between 1/64 and 1/32, where many weights are, bfloat16 has steps
of 1.2e-4: at a learning rate of 2e-5 the sum is rounded back to the old weight, and nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

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


class HalfWeights(Override):
    """Overrides the forward of a block, or of the ViT around the blocks, some of whose weights are kept in float32.

    It runs with these weights in half precision, as if they had never been cast, also in a recomputation. What reads
    weights without calling their module is covered, such as `nn.MultiheadAttention`.

    Args:
        unit: The block or the ViT.
        names: Names of the weights in it.
        dtype: The type to run in.
    """

    def __init__(self, unit: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__(unit, "forward")
        self.names, self.dtype = names, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with weights in half precision; their gradients come in float32."""
        weights = ((name, self.owner.get_parameter(name)) for name in self.names)
        half = {f"unit.{name}": w.to(self.dtype) for name, w in weights if w.dtype == torch.float32}
        return functional_call(_Run(self.owner, self.inner), half, self._own(args), kwargs)


class _Run(nn.Module):
    """Calls the own method of a module, in the form that `functional_call` takes."""

    inner: Callable[..., Any]

    def __init__(self, unit: nn.Module, inner: Callable[..., Any]) -> None:
        super().__init__()
        self.unit = unit
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.inner(*args, **kwargs)


def widen_weights(vit: nn.Module, names: Iterable[str], blocks: Iterable[str]) -> dict[str, torch.dtype]:
    """Cast trained weights of a ViT from half precision to float32; it still runs in half precision.

    Args:
        vit: The ViT.
        names: Names of the weights; those that are frozen or sharded are left as they are.
        blocks: Paths of its blocks, which activation checkpointing runs by themselves.

    Returns:
        The types of those that were cast, by name.
    """
    narrow: dict[str, torch.dtype] = {}
    units: dict[str, list[str]] = {}
    paths = sorted(set(blocks))
    for name in names:
        parameter = vit.get_parameter(name)
        if not parameter.requires_grad or parameter.dtype not in HALF or is_sharded(parameter):
            continue
        narrow[name] = parameter.dtype
        parameter.data = parameter.data.float()
        units.setdefault(next((path for path in paths if name.startswith(f"{path}.")), ""), []).append(name)
    for path, inside in units.items():
        unit = vit.get_submodule(path)
        own = tuple(name.removeprefix(f"{path}.") for name in inside)
        before = unit.__dict__.get("forward")
        if isinstance(before, HalfWeights):
            before.names += own
        else:
            HalfWeights(unit, own, narrow[inside[0]]).install()
    return narrow


def narrow_weights(vit: nn.Module, narrow: Mapping[str, torch.dtype]) -> None:
    """Undo `widen_weights`; where the ViT was cast since, its weights keep the type that they have.

    Args:
        vit: The ViT.
        narrow: What `widen_weights` returned.
    """
    for module in vit.modules():
        override = module.__dict__.get("forward")
        if isinstance(override, HalfWeights):
            override.remove()
    rest = {p.dtype for name, p in vit.named_parameters() if name not in narrow and p.is_floating_point()}
    for name, dtype in narrow.items():
        parameter = vit.get_parameter(name)
        if parameter.dtype == torch.float32 and (dtype in rest or not rest):
            parameter.data = parameter.data.to(dtype)
