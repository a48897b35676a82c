"""Sharded weights, gathered where covft copies, reads or writes them.

DeepSpeed's ZeRO-3 leaves an empty parameter, FSDP2 and tensor parallelism a DTensor. Gathering is a collective: every
process has to do it, in the same order, even if it drops the result.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from covft.utils.transformers_names import deepspeed_config, deepspeed_integration


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter of ZeRO-3 whose values are elsewhere at the moment."""
    return is_zero(tensor) and tensor.ds_status.name != "AVAILABLE"  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor has to be gathered before it can be read."""
    return is_partitioned(tensor) or _is_dtensor(tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the unsharded tensor."""
    return tuple(tensor.ds_shape if is_zero(tensor) else tensor.shape)  # type: ignore[attr-defined]


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], *, changed: bool = False) -> Iterator[None]:
    """Gather parameters of ZeRO-3, the same on every process, for a while; others are left as they are.

    If they are `changed` meanwhile, the values of process 0 are kept.

    Example:
        >>> with gathered([torch.nn.Parameter(torch.ones(2))]):
        ...     pass
    """
    # A caller may hold one gathered already; only to be changed it has to be partitioned again.
    zero = [p for p in parameters if (is_zero(p) if changed else is_partitioned(p))]
    if not zero:
        yield
        return
    with importlib.import_module("deepspeed").zero.GatheredParameters(zero, modifier_rank=0 if changed else None):
        yield


def full(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor, without gradient; itself where it is not sharded.

    A state dict's copy of a parameter of ZeRO-3 is an ordinary empty tensor: take the state dict with `keep_vars=True`.
    """
    if is_partitioned(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor.detach().full_tensor() if _is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy an unsharded value, the same on every process, into a tensor, sharded or not."""
    with torch.no_grad(), gathered([tensor], changed=True):
        if _is_dtensor(tensor):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            value = distribute_tensor(value.to(tensor.device, tensor.dtype), mesh, placements)
        tensor.copy_(value)


def whole_copy(module: nn.Module) -> nn.Module:
    """Copy a module that ZeRO-3 partitioned to one with ordinary parameters on the CPU; return any other itself."""
    parameters = list(module.parameters())
    if not any(is_zero(p) for p in parameters):
        return module
    with gathered(parameters):
        return copy.deepcopy(module).cpu()


def partition_like(like: Iterable[Tensor], module: nn.Module) -> None:
    """Let ZeRO-3 partition a new module, with the values of process 0, if it partitioned the parameters `like`.

    DeepSpeed's engine would do so too, but all new modules together may exceed the memory of a device.
    """
    zero = next((p for p in like if is_zero(p)), None)
    if zero is not None:
        zero.convert_to_zero_parameters(param_list=list(module.parameters()))  # type: ignore[attr-defined]


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Let transformers load models unsharded, even while a DeepSpeed config of `TrainingArguments` asks for ZeRO-3.

    For small frozen models outside the engine, which alone would gather them.
    """
    integration = deepspeed_integration()
    if integration is None:
        yield
        return
    config = deepspeed_config(integration)
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


def in_engine(module: nn.Module) -> bool:
    """Return whether a DeepSpeed engine works on a module: its optimizer then keeps values of its own."""
    return any(type(m._parameters).__name__ == "ZeROOrderedDict" for m in module.modules()) or any(
        hasattr(p, "_hp_mapping") for p in module.parameters()
    )


def is_main_process() -> bool:
    """Return whether this is the process that writes: the first of all, or the only one."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def is_distributed() -> bool:
    """Return whether torch.distributed is initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_zero(tensor: Tensor) -> bool:
    """Return whether DeepSpeed's ZeRO-3 manages a tensor, wherever its values are."""
    return hasattr(tensor, "ds_id")


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # without importing what most users never need
