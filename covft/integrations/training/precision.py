"""Decides whether what is trained has to be kept in float32 for the optimizer."""

from __future__ import annotations

from torch import nn

from covft.integrations.mllm.attach import get_encoder


def train_in_float32(model: nn.Module) -> int:
    """Cast what covft trains of a model in half precision to float32, before the optimizer is created.

    As peft does for its adapters. Where the engine shards the model, everything is left as it is: DeepSpeed keeps
    float32 copies, accelerate casts trained parameters before FSDP shards them if there is mixed precision.

    Args:
        model: An attached model.

    Returns:
        Number of parameters that were cast.
    """
    return 0 if _engine() in ("DEEPSPEED", "FSDP") else get_encoder(model).train_in_float32()


def keeps_float32_copies() -> bool:
    """Return whether the optimizer changes float32 copies of the parameters, which may not show in them yet."""
    return _engine() == "DEEPSPEED"


def _engine() -> str:
    from accelerate.state import AcceleratorState

    return AcceleratorState().distributed_type.name
