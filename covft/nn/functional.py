"""Small pure functions that the modules share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wide_softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis in float32 or wider, whatever the type of the logits.

    Half-precision weights would not sum to 1 closely enough to leave a wrapped ViT's output unchanged.

    Args:
        logits: Any shape.

    Returns:
        Probabilities in [0, 1], same shape, float32 or float64.
    """
    return F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def masked_mean(tokens_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Mean over the tokens that count.

    Args:
        tokens_BND: Tokens, shape `(B, N, D)`.
        mask_BN: True where a token counts, shape `(B, N)`; None where all do.

    Returns:
        Shape `(B, D)`.
    """
    if mask_BN is None:
        return tokens_BND.mean(dim=1)
    weights_BN1 = mask_BN.to(tokens_BND.dtype)[..., None]
    return (tokens_BND * weights_BN1).sum(dim=1) / weights_BN1.sum(dim=1)
