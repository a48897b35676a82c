"""Auxiliary losses of a router, as pure functions of its decisions.

Shapes: B images, E experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from covft.nn.functional import wide_softmax


def load_balance_loss(logits_BE: Tensor, expert_ids_BK: Tensor) -> Tensor:
    r"""Measure how unevenly images are spread over experts: $E \sum_e f_e P_e$, 1 when even.

    $f_e$ is the share of choices that fell on expert e, $P_e$ the mean softmax weight of e over the
    batch (Fedus et al., Switch Transformers, eqs. 4 to 6, with K choices per image).

    Args:
        logits_BE: Router logits, shape `(B, E)`.
        expert_ids_BK: The chosen experts, shape `(B, K)`.

    Returns:
        A scalar in [~0, E]; gradients flow through the softmax weights alone.

    Example:
        >>> load_balance_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    num_experts = logits_BE.shape[-1]
    probabilities_E = wide_softmax(logits_BE).mean(dim=0)
    counts_E = torch.zeros_like(probabilities_E).scatter_add(
        0, expert_ids_BK.flatten(), torch.ones_like(expert_ids_BK.flatten(), dtype=probabilities_E.dtype)
    )
    return num_experts * (counts_E / expert_ids_BK.numel() * probabilities_E).sum()


def router_z_loss(logits_BE: Tensor) -> Tensor:
    """Return the mean squared log-partition of the router logits; keeps them small (Zoph et al., ST-MoE, eq. 5).

    Args:
        logits_BE: Router logits, shape `(B, E)`.

    Returns:
        A scalar >= 0.
    """
    return logits_BE.to(torch.promote_types(logits_BE.dtype, torch.float32)).logsumexp(dim=-1).square().mean()
