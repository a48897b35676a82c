"""Which experts an image uses, and with what weight: one decision per image, shared by its tokens.

Shapes: B images, T tokens of all images of a packed batch, W context_dim (width of the context vector), E experts,
K top_k.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from covft.errors import ConfigError
from covft.nn.functional import Place, in_type_of, wide_softmax
from covft.utils.arguments import check_kinds, check_sizes


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
        """Give each token the decision of its image, with T in the place of B.

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
        """Decide for a batch; `dtype` is the type of weights that need no context, `seed` that of a draw."""
        ...


def check_top_k(top_k: int, num_experts: int) -> None:
    """Refuse more experts per image than there are.

    Raises:
        ConfigError: If `top_k` is not from 1 to `num_experts`.
    """
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k={top_k} cannot be used.", expected=f"1 to num_experts={num_experts}", got=top_k)


class DenseRouter(nn.Module):
    r"""All experts, weighted by $g = softmax(W c + b)$, eq. 9 of the CoVFT paper.

    The gate keeps the random default of `nn.Linear`. It must not start at zero: with equal experts
    and weights that are the same for every text, the experts would get proportional gradients and an
    adaptive optimizer would keep them equal for ever.

    Args:
        context_dim: Width W of the context vector.
        num_experts: Number of experts E.
        **place: `device` and `dtype` of the parameters.
    """

    needs_context = True

    @check_kinds
    def __init__(self, context_dim: int, num_experts: int, **place: Unpack[Place]) -> None:
        super().__init__()
        check_sizes(context_dim=context_dim, num_experts=num_experts)
        self.num_experts = num_experts
        self.gate = nn.Linear(context_dim, num_experts, **place)

    def forward(self, context_BW: Tensor, batch_size: int, **_: Any) -> Routing:
        """Decide for a batch by its context alone; weights are float32 or wider."""
        return self._decide(self.gate(in_type_of(context_BW, self.gate.weight)))

    def _decide(self, logits_BE: Tensor) -> Routing:
        return Routing(wide_softmax(logits_BE), None, logits_BE)


class SparseRouter(DenseRouter):
    """The `top_k` experts of the softmax, their weights renormalised to sum to 1; the others have weight 0.

    Args:
        context_dim: Width W of the context vector.
        num_experts: Number of experts E.
        top_k: Experts per image K.
        **place: `device` and `dtype` of the parameters.
    """

    @check_kinds
    def __init__(self, context_dim: int, num_experts: int, top_k: int, **place: Unpack[Place]) -> None:
        super().__init__(context_dim, num_experts, **place)
        check_top_k(top_k, num_experts)
        self.top_k = top_k

    def _decide(self, logits_BE: Tensor) -> Routing:
        dense_BE = wide_softmax(logits_BE)
        best_BK, expert_ids_BK = dense_BE.topk(self.top_k, dim=-1)
        best_BK = best_BK / best_BK.sum(dim=-1, keepdim=True)
        weights_BE = torch.zeros_like(dense_BE).scatter(-1, expert_ids_BK, best_BK)
        return Routing(weights_BE, expert_ids_BK, logits_BE)


class UniformRouter(nn.Module):
    """All experts with equal weights; nothing is learned and no context is used."""

    needs_context = False

    @check_kinds
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        check_sizes(num_experts=num_experts)
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
        """Return equal weights for every image."""
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

    @check_kinds
    def __init__(self, num_experts: int, top_k: int, *, eval_seed: int = 0) -> None:
        super().__init__()
        check_sizes(num_experts=num_experts)
        check_top_k(top_k, num_experts)
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
        """Draw for a batch; in training mode from `seed`, or from torch's default generator if it is None."""
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
    **place: Unpack[Place],
) -> nn.Module:
    """Build the router that a setting names.

    Args:
        routing: `"dense"`, `"sparse"`, `"uniform"` or `"random"`.
        num_experts: Number of experts E.
        context_dim: Width W of the context vector; None where nothing is learned.
        top_k: Experts per image for `"sparse"` and `"random"`.
        eval_seed: Seed of `"random"` in eval mode.
        **place: `device` and `dtype` of the parameters.
    """
    if routing == "uniform":
        return UniformRouter(num_experts)
    if routing == "random":
        return RandomRouter(num_experts, top_k, eval_seed=eval_seed)
    assert context_dim is not None, "a learned router has a context"
    if routing == "sparse":
        return SparseRouter(context_dim, num_experts, top_k, **place)
    return DenseRouter(context_dim, num_experts, **place)
