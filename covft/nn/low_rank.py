"""Experts that share one FFN and differ from it by low-rank matrices.

$W_e = W + B_e A_e$ for every linear layer of the FFN. The products with $W$ are computed once for all experts: the
first layer's because its input is the same for all, the last layer's because it is linear in what is mixed. What an
expert costs is its activation and two thin products per layer.

Shapes: B images, N tokens, D embed_dim, F ffn_dim, E experts, R rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from covft.errors import UnsupportedViTError
from covft.nn.plan import FFNPlan
from covft.nn.router import Routing


class LowRankDifference(nn.Module):
    """What experts add to one linear layer: `B_e A_e` to its weight, and a vector to its bias.

    Args:
        layer: The layer; gives sizes, device and type.
        num_experts: Number of experts E.
        rank: Rank R of each difference.

    Attributes:
        down: The matrices A, shape `(E, R, in_features)`, random.
        up: The matrices B, shape `(E, out_features, R)`, zeros, so that experts begin as the layer itself.
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
        """Draw `down` as the weight of a linear layer is drawn, and set the rest to zero."""
        if not self.down.is_meta:
            bound = 1 / math.sqrt(self.down.shape[-1])
            nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """What one expert adds to the layer's output for tokens `x`, shape `(..., in_features)`."""
        return linear(linear(x, self.down[expert]), self.up[expert], None if self.bias is None else self.bias[expert])

    @torch.no_grad()
    def approximate(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Take the best approximations of given differences, by singular values.

        Args:
            weights: The difference of each expert's weight, shape `(out_features, in_features)`.
            biases: The difference of each expert's bias, which is kept exactly.
        """
        rank = self.down.shape[1]
        for expert, difference in enumerate(weights):
            up, down = _best_factors(difference, rank)
            self.up[expert].zero_()
            self.down[expert].zero_()
            self.up[expert, :, : up.shape[1]] = up.to(self.up)
            self.down[expert, : down.shape[0]] = down.to(self.down)
            own = biases[expert]
            if self.bias is not None and own is not None:
                self.bias[expert] = own.to(self.bias)


class LowRankExperts(nn.Module):
    r"""FFNs that share their weights but for low-rank differences, mixed with one set of weights per image.

    Args:
        ffn: The FFN that is shared; it is copied, and the copy is frozen.
        num_experts: Number of experts E.
        rank: Rank R of the differences.

    Raises:
        UnsupportedViTError: If the FFN is not of the form linear, activation, linear.

    Example:
        >>> ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> experts = LowRankExperts(ffn, num_experts=3, rank=2)
        >>> experts(torch.rand(2, 5, 8), Routing(torch.full((2, 3), 1 / 3))).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, ffn: nn.Module, num_experts: int, rank: int) -> None:
        super().__init__()
        plan, reason = FFNPlan.of(ffn)
        if plan is None:
            raise UnsupportedViTError(
                f"Experts of low rank cannot be made from {type(ffn).__name__}: {reason}.",
                expected="an FFN of the form linear, activation, linear, or a gated one",
                got=type(ffn).__name__,
                fix="expert_rank=None, which copies the FFN whole",
            )
        self.plan, self.num_experts, self.rank = plan, num_experts, rank
        self.shared = copy.deepcopy(ffn).requires_grad_(False)
        layers = [self.shared.get_submodule(name) for name in (*plan.first, plan.last)]
        self.differences = nn.ModuleList(LowRankDifference(layer, num_experts, rank) for layer in layers)  # type: ignore[arg-type]

    @classmethod
    def of(cls, experts: Sequence[nn.Module], rank: int) -> LowRankExperts:
        """Approximate whole experts: they share their mean, and differ by what is left at this rank.

        Args:
            experts: The experts, equal in form.
            rank: Rank R of the differences.

        Raises:
            UnsupportedViTError: If they are not of the form linear, activation, linear.
        """
        found = cls(experts[0], len(experts), rank)
        other = next((number for number, expert in enumerate(experts) if not found.plan.applies_to(expert)), None)
        if other is not None:
            raise UnsupportedViTError(
                f"What expert {other} computes cannot be read off its weights.",
                expected="linear layers as they are, whole and without hooks",
                got=type(experts[other]).__name__,
            )
        with torch.no_grad():
            theirs = [found.plan.weights(expert) for expert in experts]
            for number, shared in enumerate(found.plan.weights(found.shared)):
                if shared is not None:
                    shared.copy_(torch.stack([own[number].float() for own in theirs]).mean(0))  # type: ignore[union-attr]
            means = found.plan.weights(found.shared)
        for layer, difference in enumerate(found.differences):
            assert isinstance(difference, LowRankDifference)
            weights = [own[2 * layer].float() - means[2 * layer].float() for own in theirs]  # type: ignore[union-attr]
            biases = [
                None if own[2 * layer + 1] is None else own[2 * layer + 1].float() - means[2 * layer + 1].float()  # type: ignore[union-attr]
                for own in theirs
            ]
            difference.approximate(weights, biases)
        return found.train(experts[0].training)

    def __len__(self) -> int:
        """Number of experts E."""
        return self.num_experts

    @property
    def summary(self) -> str:
        """How the experts are made, for `print`."""
        return f"expert_rank={self.rank}"

    @property
    def prototype(self) -> nn.Module:
        """What foreign code sees in the place of the FFN: what all experts share."""
        return self.shared

    def forward(self, x: Tensor, routing: Routing, *args: Any, **kwargs: Any) -> Tensor:
        """Mix the experts.

        Args:
            x: Tokens, shape `(B, ..., D)`.
            routing: One decision per image, weights that sum to 1; an expert that it leaves out has weight 0.
            *args: Refused: what an FFN makes of more than tokens is not known.
            **kwargs: Refused.

        Returns:
            Tokens, same shape as `x`.

        Raises:
            UnsupportedViTError: If the block gives its FFN more than tokens.
        """
        if args or kwargs:
            raise UnsupportedViTError(
                "Experts of low rank take tokens alone, but the block gives its FFN more.",
                expected="one tensor",
                got=f"{len(args)} further arguments" + (f" and {', '.join(kwargs)}" if kwargs else ""),
                fix="expert_rank=None, which copies the FFN whole",
            )
        between, names = self.plan.between(self.shared), (*self.plan.first, self.plan.last)
        *first, last = (self.shared.get_submodule(name) for name in names)
        *into, out = self.differences
        pre = [layer(x) for layer in first]
        hidden: Tensor | None = None
        added: Tensor | None = None
        for expert in range(self.num_experts):
            own = between(*(p + difference(x, expert) for p, difference in zip(pre, into, strict=True)))
            weight = routing.weights_BE[:, expert].to(own.dtype).view(-1, *[1] * (own.dim() - 1))
            weighed = own * weight
            hidden = weighed if hidden is None else hidden + weighed
            # linear in what is weighed, but for the bias
            thin = linear(linear(weighed, out.down[expert]), out.up[expert])  # type: ignore[index]
            if out.bias is not None:
                thin = thin + weight * out.bias[expert].to(thin.dtype)  # type: ignore[index]
            added = thin if added is None else added + thin
        assert hidden is not None
        assert added is not None
        # The weights sum to 1, so the shared bias counts once.
        return last(hidden) + added


def _best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two matrices of about the same size whose product is nearest to a matrix, of shape `(out, R)` and `(R, in)`.

    The eigenvectors of the smaller Gram matrix are the singular vectors on that side, and take a quarter of the time.
    To project on them is exact for a full rank, however small a direction is.
    """
    if matrix.shape[0] < matrix.shape[1]:
        up, down = _best_factors(matrix.t(), rank)
        return down.t(), up.t()
    squares, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    kept = min(rank, len(squares))
    right = vectors[:, -kept:]
    # What is smaller than rounding may come out negative; without a floor its direction would be lost.
    root = squares[-kept:].clamp_min(torch.finfo(squares.dtype).eps * squares[-1]).pow(0.25)
    return (matrix @ right) / root.where(root > 0, 1), root[:, None] * right.t()
