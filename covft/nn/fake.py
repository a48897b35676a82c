"""A public fake: a router whose decisions are given, for tests of what comes after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from covft.nn.router import Routing


class FixedRouter(nn.Module):
    """Gives the same weights to every image, or the given weights to each.

    Args:
        weights: Routing weights, shape `(E,)` for every image, or `(B, E)` for a batch of B; rows sum to 1.

    Example:
        >>> FixedRouter(torch.tensor([0.5, 0.5]))(None, 3, device=torch.device("cpu")).weights_BE.shape
        torch.Size([3, 2])
    """

    needs_context = False
    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.num_experts = weights.shape[-1]
        self.register_buffer("weights", weights, persistent=False)

    def forward(
        self,
        context_BW: Tensor | None,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Routing:
        """The given weights, shape `(B, E)`."""
        return Routing(self.weights.to(device, dtype).expand(batch_size, -1))
