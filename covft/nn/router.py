"""Which experts an image uses, and with what weight: one decision per image, shared by its tokens.

Shapes: B images, W context_dim (width of the context vector), E experts, K = top_k.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from covft.nn.functional import wide_softmax


class Routing(NamedTuple):
    """One routing decision per image.

    Attributes:
        weights_BE: Routing weights, shape `(B, E)`; every row sums to 1.
        expert_ids_BK: The chosen experts, shape `(B, K)`; None where all experts run.
        logits_BE: Router logits before the softmax, shape `(B, E)`; None where nothing is learned.
    """

    weights_BE: Tensor
    expert_ids_BK: Tensor | None = None
    logits_BE: Tensor | None = None

    def per_token(self, ids_T: Tensor) -> Routing:
        """The decision of the image that each token belongs to, with T in the place of B.

        Args:
            ids_T: The image of each token, shape `(T,)`.
        """
        expert_ids = None if self.expert_ids_BK is None else self.expert_ids_BK.index_select(0, ids_T)
        return Routing(self.weights_BE.index_select(0, ids_T), expert_ids)


class Router(Protocol):
    """What a router is: context vectors in, one `Routing` out."""

    num_experts: int
    needs_context: bool

    def __call__(
        self,
        context_BW: Tensor | None,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Routing:
        """Decide for a batch; `dtype` is that of weights which follow from no context."""
        ...


class DenseRouter(nn.Module):
    r"""All experts, weighted by $g = softmax(W c + b)$, eq. 9 of the CoVFT paper.

    The gate keeps the random default of `nn.Linear`. It must not start at zero: with equal experts
    and weights that are the same for every text, the experts would get proportional gradients and an
    adaptive optimizer would keep them equal for ever.

    Args:
        context_dim: Width W of the context vector.
        num_experts: Number of experts E.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    needs_context = True

    def __init__(
        self,
        context_dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(context_dim, num_experts, device=device, dtype=dtype)

    def forward(
        self,
        context_BW: Tensor,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Routing:
        """Decide for a batch; weights are float32 or wider."""
        logits_BE = self.gate(context_BW)
        return Routing(wide_softmax(logits_BE), None, logits_BE)


class SparseRouter(DenseRouter):
    """The `top_k` experts of the softmax, their weights renormalised to sum to 1.

    Args:
        context_dim: Width W of the context vector.
        num_experts: Number of experts E.
        top_k: Experts per image K.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        context_dim: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(context_dim, num_experts, device=device, dtype=dtype)
        self.top_k = top_k

    def forward(
        self,
        context_BW: Tensor,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Routing:
        """Decide for a batch; weights are zero for the experts that were not chosen."""
        dense = super().forward(context_BW, batch_size, device=device)
        best_BK, expert_ids_BK = dense.weights_BE.topk(self.top_k, dim=-1)
        best_BK = best_BK / best_BK.sum(dim=-1, keepdim=True)
        weights_BE = torch.zeros_like(dense.weights_BE).scatter(-1, expert_ids_BK, best_BK)
        return Routing(weights_BE, expert_ids_BK, dense.logits_BE)


class UniformRouter(nn.Module):
    """All experts with equal weights; nothing is learned and no context is used."""

    needs_context = False

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(
        self,
        context_BW: Tensor | None,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Routing:
        """Equal weights for every image."""
        shape = (batch_size, self.num_experts)
        return Routing(torch.full(shape, 1 / self.num_experts, device=device, dtype=dtype))


class RandomRouter(nn.Module):
    """`top_k` experts drawn per image, with equal weights; nothing is learned and no context is used.

    Args:
        num_experts: Number of experts E.
        top_k: Experts per image K.
        eval_seed: Seed of the draw in eval mode, where the same batch always gets the same experts.
    """

    needs_context = False

    def __init__(self, num_experts: int, top_k: int, *, eval_seed: int = 0) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.eval_seed = eval_seed

    def forward(
        self,
        context_BW: Tensor | None,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Routing:
        """Draw for a batch.

        Args:
            context_BW: Not looked at.
            batch_size: Number of images B.
            device: Where the weights are put.
            dtype: Type of the weights.
            seed: Of the draw in training mode; None draws from torch's default generator.
        """
        generator = None
        if not self.training:
            generator = torch.Generator().manual_seed(self.eval_seed)
        elif seed is not None:
            generator = torch.Generator().manual_seed((seed + self.eval_seed) % 2**63)
        # Drawn on the CPU, so that every device gets the same experts.
        scores_BE = torch.rand(batch_size, self.num_experts, generator=generator)
        expert_ids_BK = scores_BE.topk(self.top_k, dim=-1).indices.to(device)
        weights_BE = torch.zeros(batch_size, self.num_experts, device=device, dtype=dtype)
        return Routing(weights_BE.scatter(-1, expert_ids_BK, 1 / self.top_k), expert_ids_BK)


def make_router(
    routing: str,
    num_experts: int,
    *,
    context_dim: int | None,
    top_k: int = 2,
    eval_seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the router that a setting names.

    Args:
        routing: `"dense"`, `"sparse"`, `"uniform"` or `"random"`.
        num_experts: Number of experts E.
        context_dim: Width W of the context vector; None where nothing is learned.
        top_k: Experts per image for `"sparse"` and `"random"`.
        eval_seed: Seed of `"random"` in eval mode.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """
    if routing == "uniform":
        return UniformRouter(num_experts)
    if routing == "random":
        return RandomRouter(num_experts, top_k, eval_seed=eval_seed)
    assert context_dim is not None, "a learned router has a context"
    if routing == "sparse":
        return SparseRouter(context_dim, num_experts, top_k, device=device, dtype=dtype)
    return DenseRouter(context_dim, num_experts, device=device, dtype=dtype)
