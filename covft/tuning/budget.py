"""What a method costs, before anything is built."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from covft.adapters.registry import describe
from covft.tuning.api import tune
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.parameters import count

_TOKENS = 16  # of a question


@dataclass(frozen=True)
class Budget:
    """What tuning a tower by a method costs.

    Attributes:
        method: Name of the method.
        options: Options that were given.
        parameters: Trained parameters.
        added: Parameters that the method adds, among these or not.
        forward_flops: FLOPs that a forward of one image takes in addition to the plain tower's.
        step_flops: FLOPs of a forward and a backward of one image in addition to a forward of the plain tower.
        kept_bytes: What autograd keeps of one image for backward, in bytes, weights not counted.
    """

    method: str
    options: dict[str, Any]
    parameters: int
    added: int
    forward_flops: int | None = None
    step_flops: int | None = None
    kept_bytes: int | None = None


@check_kinds
def budget(
    vit: nn.Module,
    method: str,
    *,
    text_dim: int = 768,
    **options: Any,
) -> Budget:
    """Return what a method would cost in a ViT alone: what `covft.budget` does with one.

    Args:
        vit: The ViT, which is not changed.
        method: Name of a method.
        text_dim: As for `covft.budget`.
        **options: Options of the method.

    Raises:
        CoVFTError: As `covft.tune` does.
    """
    check_sizes(text_dim=text_dim)
    twin = twin_of(vit)
    total = count(twin.parameters())
    with torch.device("meta"):
        tuned: Any = tune(twin, method, text_encoder=text_dim, **options)
    trained = count(tuned.trainable_parameters())
    cost = (None, None, None)
    given = _inputs(vit)
    if given is not None:
        plain, text = twin_of(vit), text_for(tuned, text_dim)
        cost = measured(lambda: plain(**given), lambda: tuned(text=text, **given), twin)
    return Budget(method, dict(options), trained, count(twin.parameters()) - total, *cost)


def twin_of(vit: nn.Module) -> nn.Module:
    """Copy a ViT without the values of its parameters and floating-point buffers."""
    memo: dict[int, Any] = {}
    for parameter in vit.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    for buffer in vit.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(vit, memo).eval()


def _inputs(vit: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of a call with one image; None where its size is not known."""
    spec = describe(vit)
    if spec.image_size is None or spec.input.is_packed or spec.input.image_axes > 1 or spec.input.mask_argument:
        return None
    name = next(iter(inspect.signature(vit.forward).parameters))
    dtype = next(vit.parameters()).dtype
    return {name: torch.empty(1, 3, spec.image_size, spec.image_size, dtype=dtype, device="meta")}


def text_for(tuned: Any, text_dim: int) -> Tensor:
    """Return a text without values, as a tuned ViT or an encoder reads it."""
    shape = (1, _TOKENS, text_dim) if getattr(tuned, "reads_states", False) else (1, text_dim)
    return torch.empty(shape, device="meta")


def measured(
    plain: Callable[[], Any], tuned: Callable[[], Any], changed: nn.Module
) -> tuple[int | None, int | None, int | None]:
    """Count FLOPs and bytes in runs without values.

    Args:
        plain: Runs what is not tuned; returns features, or something that begins with them.
        tuned: Runs the same, tuned.
        changed: The module that the tuned run is one of.

    Returns:
        `forward_flops`, `step_flops` and `kept_bytes` of `Budget`.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain()
    base = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output = tuned()
        forward = counter.get_total_flops()
        features = output if isinstance(output, Tensor) else output[0]
        if features.requires_grad:
            features.sum().backward()
    return forward - base, counter.get_total_flops() - base, _kept(tuned, changed)


class _Held:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a node that held its own output would never be freed


def _kept(tuned: Callable[[], Any], changed: nn.Module) -> int:
    """Count the bytes that autograd keeps of a forward, without weights."""
    weights = {_storage(parameter) for parameter in changed.parameters()}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def hold(tensor: Tensor) -> _Held:
        kept = _Held(tensor)
        held.add(kept)
        return kept

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(hold, lambda kept: kept.tensor):
        output = tuned()
    tensors = [kept.tensor for kept in held]
    del output
    sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for storage, size in sizes.items() if storage not in weights)


class _FusedAttention(TorchFunctionMode):
    """Lets attention keep what fused kernels keep: without values it falls back on one that keeps the N x N weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the attention; called for each function of torch."""
        if func is nn.functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return _Fused.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Attention without values, as far as shapes and what is kept go."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of the output's shape, laid out by tokens as those of the kernels are."""
        *batch, heads, length, _ = (1, *query.shape) if query.dim() == 3 else query.shape
        output = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-2, -3)
        output = output[0] if query.dim() == 3 else output
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Not called: what is kept is known after the forward."""
        raise NotImplementedError


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata
