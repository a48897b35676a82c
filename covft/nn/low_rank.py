"""Experts that share one FFN and differ from it by low-rank matrices.

$W_e = W + B_e A_e$ for every linear layer of the FFN. The products with $W$ are computed once for all experts: the
first layer's because all experts have the same input, the last layer's because it is linear in what is mixed. An expert
costs its activation and two thin products per layer.

Shapes: B images, N tokens of an image, D embed_dim, E experts, Q rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from covft.errors import UnsupportedViTError
from covft.nn.experts import _Repeatable
from covft.nn.functional import per_image
from covft.nn.fused import needs_plain_operations
from covft.nn.plan import FFNPlan, pairs
from covft.nn.router import Routing


class LowRankDifference(nn.Module):
    """Adds `B_e A_e` to the weight of one linear layer for each expert, and a vector to its bias.

    Attributes:
        down: The matrices A, shape `(E, Q, in_features)`, random.
        up: The matrices B, shape `(E, out_features, Q)`, zeros, so that experts start as the layer itself.
        bias: Shape `(E, out_features)`, zeros; None where the layer has no bias.
    """

    def __init__(self, layer: nn.Linear, num_experts: int, rank: int) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down = nn.Parameter(torch.empty(num_experts, rank, layer.in_features, **like))
        self.up = nn.Parameter(torch.zeros(num_experts, layer.out_features, rank, **like))
        self.bias: nn.Parameter | None = None
        if layer.bias is not None:
            self.bias = nn.Parameter(torch.zeros(num_experts, layer.out_features, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `down` like the weight of a linear layer, and set the rest to zero."""
        if not self.down.is_meta:
            bound = 1 / math.sqrt(self.down.shape[-1])
            nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Return what one expert adds to the layer's output for tokens `x`, shape `(..., in_features)`."""
        return linear(linear(x, self.down[expert]), self.up[expert], None if self.bias is None else self.bias[expert])

    @torch.no_grad()
    def approximate(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Approximate each expert's difference of the weight, by singular values; that of the bias is kept exactly."""
        self.up.zero_()
        self.down.zero_()
        for expert, (difference, bias) in enumerate(zip(weights, biases, strict=True)):
            up, down = _best_factors(difference, self.down.shape[1])
            self.up[expert, :, : up.shape[1]] = up.to(self.up)
            self.down[expert, : len(down)] = down.to(self.down)
            if self.bias is not None and bias is not None:
                self.bias[expert] = bias.to(self.bias)


class LowRankExperts(nn.Module):
    r"""FFNs that share their weights except for low-rank differences, mixed with one set of weights per image.

    The shared FFN is a frozen copy of the given one.

    Attributes:
        recompute: What backward recomputes, as in `Experts`: `"none"`; `"activation"`, all but the products of the
            shared first layers; `"all"`, also those.

    Raises:
        UnsupportedViTError: If the FFN is not of the form linear, activation, linear.

    Example:
        >>> ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> experts = LowRankExperts(ffn, num_experts=3, rank=2)
        >>> experts(torch.rand(2, 5, 8), Routing(torch.full((2, 3), 1 / 3))).shape
        torch.Size([2, 5, 8])
    """

    recompute: str = "none"

    def __init__(self, ffn: nn.Module, num_experts: int, rank: int) -> None:
        super().__init__()
        plan, reason = FFNPlan.of(ffn)
        if plan is None:
            raise UnsupportedViTError(
                f"Experts of low rank cannot be made from {type(ffn).__name__}: {reason}.",
                expected="an FFN of the form linear, activation, linear, or a gated one",
                got=type(ffn).__name__,
                fix="expert_rank=None, which copies the whole FFN",
            )
        self.plan, self.num_experts, self.rank = plan, num_experts, rank
        self.shared = copy.deepcopy(ffn).requires_grad_(False)
        layers = plan.layers(self.shared)
        self.differences = nn.ModuleList(LowRankDifference(layer, num_experts, rank) for layer in layers)

    @classmethod
    def of(cls, experts: Sequence[nn.Module], rank: int) -> LowRankExperts:
        """Approximate full experts of one form: they share their mean, and differ from it at this rank.

        Raises:
            UnsupportedViTError: If they are not of the form linear, activation, linear.
        """
        found = cls(experts[0], len(experts), rank)
        other = next((number for number, expert in enumerate(experts) if not found.plan.applies_to(expert)), None)
        if other is not None:
            raise UnsupportedViTError(
                f"What expert {other} computes cannot be read off its weights.",
                expected="plain linear layers, unsharded and without hooks",
                got=type(experts[other]).__name__,
            )
        differences: list[Any] = []
        with torch.no_grad():
            for mean, *own in zip(*map(found.plan.weights, (found.shared, *experts)), strict=True):
                if mean is not None:
                    mean.copy_(torch.stack([tensor.float() for tensor in own]).mean(0))
                differences.append([None if mean is None else tensor.float() - mean.float() for tensor in own])
        for layer, (weights, biases) in zip(found.differences, pairs(differences), strict=True):
            layer.approximate(weights, biases)  # type: ignore[operator]
        return found.train(experts[0].training)

    def __len__(self) -> int:
        """Number of experts E."""
        return self.num_experts

    @property
    def summary(self) -> str:
        """The form of the experts, and recomputation, for `print`."""
        return f"expert_rank={self.rank}, recompute={self.recompute!r}"

    @property
    def prototype(self) -> nn.Module:
        """The shared FFN, which foreign code sees in the place of the FFN."""
        return self.shared

    def forward(self, x: Tensor, routing: Routing, *args: Any, **kwargs: Any) -> Tensor:
        """Mix the experts for tokens of shape `(B, ..., D)`, same shape out; the weights of an image sum to 1.

        Raises:
            UnsupportedViTError: If the block passes more than tokens to its FFN.
        """
        if args or kwargs:
            raise UnsupportedViTError(
                "Experts of low rank take only tokens, but the block passes more to its FFN.",
                expected="one tensor",
                got=f"{len(args)} further arguments" + (f" and {', '.join(kwargs)}" if kwargs else ""),
                fix="expert_rank=None, which copies the whole FFN",
            )
        *first, last = self.plan.layers(self.shared)
        mixing, repeats = _Mixing(self), torch.is_grad_enabled() and not needs_plain_operations()
        pre = () if self.recompute == "all" and repeats else tuple(layer(x) for layer in first)
        if self.recompute != "none" and repeats:
            hidden, added = checkpoint(_Repeatable(mixing), x, routing.weights_BE, *pre, use_reentrant=False)
        else:
            hidden, added = mixing(x, routing.weights_BE, *pre)
        # The weights sum to 1, so the shared bias counts once.
        return last(hidden) + added

    def mix(self, x: Tensor, weights_BE: Tensor, *pre: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the inputs of the shared last layer, and what the experts' differences add to its output.

        Args:
            x: Tokens, shape `(B, ..., D)`.
            weights_BE: Weights of the experts.
            *pre: Outputs of the shared first layers; none computes them.
        """
        between, (*first, _) = self.plan.between(self.shared), self.plan.layers(self.shared)
        *into, out = cast(list[Any], self.differences)
        pre = pre or tuple(layer(x) for layer in first)
        hidden: Any = None
        added: Any = None
        for expert in range(self.num_experts):
            own = between(*(p + difference(x, expert) for p, difference in zip(pre, into, strict=True)))
            weight = per_image(weights_BE[:, expert], own)
            weighed = own * weight
            # linear in what is weighed, except for the bias
            thin = linear(linear(weighed, out.down[expert]), out.up[expert])
            if out.bias is not None:
                thin = thin + weight * out.bias[expert].to(thin.dtype)
            hidden, added = (weighed, thin) if hidden is None else (hidden + weighed, added + thin)
        return hidden, added


class _Mixing(nn.Module):
    """Calls `LowRankExperts.mix` as a module, whose weights `functional_call` may lend."""

    def __init__(self, experts: LowRankExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, weights_BE: Tensor, *pre: Tensor) -> tuple[Tensor, Tensor]:
        """Mix."""
        return self.experts.mix(x, weights_BE, *pre)


def _best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor the best approximation of a matrix evenly into shapes `(out, Q)` and `(Q, in)`.

    The eigenvectors of the smaller Gram matrix are the singular vectors on that side, and take a quarter of the time.
    Projecting onto them is exact at full rank, however small a direction is.
    """
    if matrix.shape[0] < matrix.shape[1]:
        up, down = _best_factors(matrix.t(), rank)
        return down.t(), up.t()
    squares, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    kept = min(rank, len(squares))
    right = vectors[:, -kept:]
    # Values below rounding may come out negative; without a floor their direction would be lost.
    root = squares[-kept:].clamp_min(torch.finfo(squares.dtype).eps * squares[-1]).pow(0.25)
    return (matrix @ right) / root.where(root > 0, 1), root[:, None] * right.t()
