"""Warns of adapted FFNs that run in training mode although nothing of them is trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from covft.surgery.wrapped import WrappedViT


class FrozenWatch:
    """Warns once, in any training loop; its method is a forward pre-hook of the ViT.

    Args:
        encoder: The wrapped ViT.
    """

    def __init__(self, encoder: WrappedViT) -> None:
        self.encoder = encoder
        self.told = False

    def check(self, vit: nn.Module, args: Any) -> None:
        """Warn if the ViT is about to run in training mode, and other code has frozen all that was added to it."""
        if self.told or not vit.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        parameters = [p for slot in self.encoder.slots().values() for p in slot.parameters()]
        if not parameters or any(p.requires_grad for p in parameters) or self.encoder.chosen_parts is not None:
            return  # none at all: sharded by FSDP1, which flattens them
        self.told = True
        warnings.warn(
            f"All {len(parameters)} tensors of the adapted FFNs are frozen, so this training does not reach them. "
            "get_peft_model, prepare_model_for_kbit_training, lock_image_tower and requires_grad_(False) freeze "
            "everything that exists when they are called. Fix: encoder.unfreeze(), for an attached model "
            "covft.get_encoder(model).unfreeze(), after that call.",
            UserWarning,
            stacklevel=2,
        )
