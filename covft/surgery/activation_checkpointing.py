"""Activation checkpointing, by the ViT library's own switch."""

from __future__ import annotations

from typing import Any

from torch import nn

from covft.errors import ReentrantCheckpointError, UnsupportedViTError
from covft.utils.transformers_names import CHECKPOINTING


def set_activation_checkpointing(vit: nn.Module, *, on: bool, options: dict[str, Any] | None = None) -> None:
    """Switch the recomputation of activations in backward on or off.

    Args:
        vit: The ViT.
        on: Whether to recompute.
        options: As transformers takes them; `use_reentrant` must not be True.

    Raises:
        ReentrantCheckpointError: If `use_reentrant=True` was asked for.
        UnsupportedViTError: If the ViT has no such switch.
    """
    options = {"use_reentrant": False, **(options or {})}
    if options["use_reentrant"]:
        raise ReentrantCheckpointError(
            "Reentrant checkpointing gives the experts of a frozen ViT no gradient.",
            expected="use_reentrant=False",
            got="use_reentrant=True",
            fix="encoder.gradient_checkpointing_enable()",
        )
    for name in CHECKPOINTING:  # transformers
        if hasattr(vit, f"{name}_enable"):
            if on:
                getattr(vit, f"{name}_enable")(**{f"{name}_kwargs": options})
            else:
                getattr(vit, f"{name}_disable")()
            return
    if not hasattr(vit, "set_grad_checkpointing"):  # timm, open_clip
        raise UnsupportedViTError(
            f"{type(vit).__name__} has no switch for activation checkpointing.",
            expected="gradient_checkpointing_enable() or set_grad_checkpointing()",
            fix="torch.utils.checkpoint.checkpoint(encoder, images, texts, use_reentrant=False)",
        )
    vit.set_grad_checkpointing(on)  # type: ignore[operator]
