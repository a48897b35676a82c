"""The obvious implementation of the equations, as the baseline.

It follows equations 7 to 10 of the paper with torch's own modules: every expert runs, the outputs are stacked, weighted
and summed; the context comes from `nn.MultiheadAttention` over all tokens, each joined with the text.

Shapes: B images, N tokens of an image, D embed_dim, C text_dim, E experts, J = D + C.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from covft.conditioning import Conditioning
from covft.nn.context import CrossAttentionContext, ResidualRefinement
from covft.nn.moe import ContextualMoE
from covft.nn.router import SparseRouter


class Refinement(nn.Module):
    """Equation 7, and the norm of equation 8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, v: Tensor) -> Tensor:
        return self.norm(v + self.down(self.act(self.up(v))))


class ObviousMoE(nn.Module):
    """Equations 7 to 10 for one block; all experts count if `top_k` is None."""

    def __init__(
        self, ffn: nn.Module, embed_dim: int, text_dim: int, num_experts: int, top_k: int | None, num_heads: int
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(ffn) for _ in range(num_experts))
        self.image, self.text = Refinement(embed_dim), Refinement(text_dim)
        width = embed_dim + text_dim
        self.attention = nn.MultiheadAttention(text_dim, num_heads, kdim=width, vdim=width, batch_first=True)
        self.gate = nn.Linear(text_dim, num_experts)
        self.top_k = top_k

    def forward(self, x_BND: Tensor, text_BC: Tensor) -> Tensor:
        image_BND = self.image(x_BND)
        query_B1C = self.text(text_BC)[:, None]
        pairs_BNJ = torch.cat([image_BND, query_B1C.expand(-1, x_BND.shape[1], -1)], dim=-1)
        context_B1C, _ = self.attention(query_B1C, pairs_BNJ, pairs_BNJ, need_weights=False)
        weights_BE = self.gate(context_B1C[:, 0]).softmax(dim=-1)
        if self.top_k is not None:
            best, chosen = weights_BE.topk(self.top_k, dim=-1)
            weights_BE = torch.zeros_like(weights_BE).scatter(1, chosen, best / best.sum(dim=-1, keepdim=True))
        outputs_BEND = torch.stack([expert(x_BND) for expert in self.experts], dim=1)
        return (outputs_BEND * weights_BE[:, :, None, None]).sum(dim=1)

    @classmethod
    @torch.no_grad()
    def like(cls, moe: ContextualMoE) -> ObviousMoE:
        """Make one with the weights of covft's mixture, which has the paper's context, so that outputs are equal."""
        context: Any = moe.context
        assert isinstance(context, CrossAttentionContext)
        router: Any = moe.router
        embed_dim, text_dim = moe.embed_dim, context.context_dim
        found = cls(
            moe.experts[0],
            embed_dim,
            text_dim,
            len(moe.experts),
            router.top_k if isinstance(router, SparseRouter) else None,
            context.attention.num_heads,
        ).to(router.gate.weight)
        for own, other in zip(found.experts, moe.experts, strict=True):
            own.load_state_dict(other.state_dict())
        for own_refinement, other_refinement in ((found.image, context.image), (found.text, context.text)):
            assert isinstance(other_refinement, ResidualRefinement)
            own_refinement.load_state_dict(other_refinement.state_dict())
        mha, theirs = found.attention, context.attention
        mha.q_proj_weight.copy_(theirs.q_proj.weight)
        mha.k_proj_weight[:, :embed_dim].copy_(theirs.k_proj_weight)  # the text half of a key changes nothing
        mha.v_proj_weight.copy_(torch.cat([theirs.v_proj_image_weight, theirs.v_proj_text.weight], dim=1))
        mha.in_proj_bias[:text_dim].copy_(theirs.q_proj.bias)
        mha.in_proj_bias[2 * text_dim :].copy_(theirs.v_proj_text.bias)
        mha.out_proj.load_state_dict(theirs.out_proj.state_dict())
        found.gate.load_state_dict(router.gate.state_dict())
        return found


class ObviousSlot(nn.Module):
    """The obvious implementation in the place of a block's FFN, with the text of the current call."""

    def __init__(self, moe: ObviousMoE, conditioning: Conditioning) -> None:
        super().__init__()
        self.moe, self.conditioning = moe, conditioning

    def forward(self, x: Tensor) -> Tensor:
        scope = self.conditioning.require()
        assert scope is not None
        text = scope.text_for(x.shape[0])
        assert text is not None
        return self.moe(x, text.to(x.dtype))
