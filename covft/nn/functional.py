"""Small pure functions that the modules share, and keywords for the device and type of parameters."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

HALF = (torch.bfloat16, torch.float16)


class Place(TypedDict, total=False):
    """Device and type of new parameters, as torch's modules take them."""

    device: torch.device | str | None
    dtype: torch.dtype | None


def wide_softmax(logits: Tensor) -> Tensor:
    """Take the softmax over the last axis in float32 or wider, whatever the type of the logits.

    Half-precision weights would not sum to 1 closely enough to leave a wrapped ViT's output unchanged.
    """
    return F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def per_image(weight_B: Tensor, like: Tensor) -> Tensor:
    """Shape one number per image to be multiplied with `like`, of shape `(B, ...)`, in its type."""
    return weight_B.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def autocasts(kind: str) -> bool:
    """Return whether autocast is on for a type of device; the meta device has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off for a type of device."""
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def in_type_of(x: Tensor, other: Any) -> Tensor:
    """Cast an input to the type of a weight, where a model has weights of several types.

    Autocast does that by itself, and packed weights that are not floating-point numbers take any input.
    """
    if not isinstance(other, Tensor) or x.dtype == other.dtype or not other.is_floating_point():
        return x
    return x if autocasts(x.device.type) else x.to(other.dtype)


def masked_mean(tokens_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Average the tokens where the mask is True, all of them without a mask; shape `(B, D)`."""
    if mask_BN is None:
        return tokens_BND.mean(dim=1)
    weights_BN1 = mask_BN.to(tokens_BND.dtype)[..., None]
    return (tokens_BND * weights_BN1).sum(dim=1) / weights_BN1.sum(dim=1)
