"""Auxiliary losses of a router, as pure functions of its decisions.

Shapes: B images, E experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from covft.errors import ShapeError
from covft.nn.functional import wide_softmax
from covft.utils.arguments import check_kinds


@check_kinds
def load_balance_loss(logits_BE: Tensor, expert_ids_BK: Tensor) -> Tensor:
    r"""Measure how unevenly images are spread over experts: $E \sum_e f_e P_e$, 1 when even.

    $f_e$ is the share of choices that fell on expert e, $P_e$ the mean softmax weight of e over the
    batch (Fedus et al., Switch Transformers, eqs. 4 to 6, with K choices per image).

    Args:
        logits_BE: Router logits, shape `(B, E)`.
        expert_ids_BK: The chosen experts, shape `(B, K)`.

    Returns:
        A scalar in [~0, E]; gradients flow through the softmax weights alone.

    Raises:
        ShapeError: If the shapes do not fit.

    Example:
        >>> load_balance_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    if logits_BE.dim() != 2 or expert_ids_BK.dim() != 2 or expert_ids_BK.is_floating_point():
        raise ShapeError(
            "The loss takes router logits and the chosen experts.",
            expected="logits (B, E) and whole numbers (B, K)",
            got=f"{tuple(logits_BE.shape)} and {expert_ids_BK.dtype} {tuple(expert_ids_BK.shape)}",
        )
    num_experts = logits_BE.shape[-1]
    probabilities_E = wide_softmax(logits_BE).mean(dim=0)
    counts_E = torch.zeros_like(probabilities_E).scatter_add(
        0, expert_ids_BK.flatten(), torch.ones_like(expert_ids_BK.flatten(), dtype=probabilities_E.dtype)
    )
    return num_experts * (counts_E / expert_ids_BK.numel() * probabilities_E).sum()


@check_kinds
def router_z_loss(logits_BE: Tensor) -> Tensor:
    """Return the mean squared log-partition of the router logits; keeps them small (Zoph et al., ST-MoE, eq. 5).

    Args:
        logits_BE: Router logits, shape `(B, E)`.

    Returns:
        A scalar >= 0.
    """
    return logits_BE.to(torch.promote_types(logits_BE.dtype, torch.float32)).logsumexp(dim=-1).square().mean()
