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

RUNS_IN = "covft_runs_in"


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

    It runs with these weights in the type that the ViT was cast to, as if they had never been kept in float32, also in
    a recomputation. What reads weights without calling their module is covered, such as `nn.MultiheadAttention`. An
    empty buffer of the unit holds the type, because casts of the ViT reach buffers: `vit.float()` is followed.

    Args:
        unit: The block or the ViT.
        names: Names of the weights in it.
        dtype: The type to run in, until the ViT is cast.
    """

    def __init__(self, unit: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__(unit, "forward")
        self.names = names
        device = next(unit.parameters()).device
        unit.register_buffer(RUNS_IN, torch.empty(0, dtype=dtype, device=device), persistent=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with weights in half precision; their gradients come in float32."""
        dtype = self.owner.get_buffer(RUNS_IN).dtype
        weights = ((name, self.owner.get_parameter(name)) for name in self.names)
        half = {f"unit.{name}": w.to(dtype) for name, w in weights if w.dtype == torch.float32}
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


def widen_weights(vit: nn.Module, names: Iterable[str], blocks: Iterable[str]) -> dict[str, str]:
    """Cast trained weights of a ViT from half precision to float32; it still runs in half precision.

    Args:
        vit: The ViT.
        names: Names of the weights; those that are frozen or sharded are left as they are.
        blocks: Paths of its blocks, which activation checkpointing runs by themselves.

    Returns:
        For each that was cast, by name, the path of the block that runs with it, or "" for the ViT.
    """
    narrow: dict[str, str] = {}
    paths = sorted(set(blocks))
    for name in names:
        parameter = vit.get_parameter(name)
        if not parameter.requires_grad or parameter.dtype not in HALF or is_sharded(parameter):
            continue
        path = next((path for path in paths if name.startswith(f"{path}.")), "")
        unit, inside = vit.get_submodule(path), (name.removeprefix(f"{path}."),)
        before = unit.__dict__.get("forward")
        if isinstance(before, HalfWeights):
            before.names += inside
        else:
            HalfWeights(unit, inside, parameter.dtype).install()
        narrow[name] = path
        parameter.data = parameter.data.float()
    return narrow


def narrow_types(vit: nn.Module, narrow: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Return the type that the ViT runs in, by the name of each weight that `widen_weights` has cast.

    Args:
        vit: The ViT.
        narrow: What `widen_weights` returned.

    Returns:
        Types by name; a later cast of the ViT is followed.
    """
    markers = {path: vit.get_submodule(path)._buffers.get(RUNS_IN) for path in set(narrow.values())}
    return {name: marker.dtype for name, path in narrow.items() if (marker := markers[path]) is not None}


def narrow_weights(vit: nn.Module, narrow: Mapping[str, str]) -> None:
    """Undo `widen_weights`: the weights get the type that the ViT has been cast to.

    Args:
        vit: The ViT.
        narrow: What `widen_weights` returned.
    """
    for name, dtype in narrow_types(vit, narrow).items():
        parameter = vit.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    for path in dict.fromkeys(narrow.values()):
        unit = vit.get_submodule(path)
        if unit._buffers.pop(RUNS_IN, None) is not None:
            unit._non_persistent_buffers_set.discard(RUNS_IN)
        override = unit.__dict__.get("forward")
        if isinstance(override, HalfWeights):
            override.remove()
