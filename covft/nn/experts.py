"""The experts: copies of a pretrained FFN, run on the images that chose them.

Shapes: B images, N tokens, D embed_dim, E experts, K = top_k.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from covft.nn.router import Routing


class Experts(nn.ModuleList):
    r"""FFNs whose outputs are mixed with one set of weights per image, $\sum_e g_e E_e(x)$.

    Any FFN module can be an expert: it is called with the tokens, and with whatever else the block
    passes to its FFN.
    """

    @classmethod
    def upcycled(cls, ffn: nn.Module, num_experts: int) -> Experts:
        """Make experts that are exact, trainable copies of a pretrained FFN.

        Args:
            ffn: The FFN; it is copied, never changed.
            num_experts: Number of copies E.
        """
        experts = cls(copy.deepcopy(ffn) for _ in range(num_experts))
        for parameter in experts.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        return experts

    def forward(self, x: Tensor, routing: Routing, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts and mix.

        Args:
            x: Tokens, shape `(B, ...)`, such as `(B, N, D)`.
            routing: One decision per image.
            *args: Handed on to every expert.
            **kwargs: Handed on to every expert.

        Returns:
            What the FFN would have returned, mixed; same shape and type.
        """
        if routing.expert_ids_BK is None:
            return self._run_all(x, routing.weights_BE, *args, **kwargs)
        return self._run_chosen(x, routing.weights_BE, routing.expert_ids_BK, *args, **kwargs)

    def _run_all(self, x: Tensor, weights_BE: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mixed: Tensor | None = None
        for weight_B, expert in zip(weights_BE.unbind(-1), self, strict=True):
            output = expert(x, *args, **kwargs)
            weight = _per_image(weight_B, output)
            mixed = output * weight if mixed is None else torch.addcmul(mixed, output, weight)
        assert mixed is not None
        return mixed

    def _run_chosen(self, x: Tensor, weights_BE: Tensor, expert_ids_BK: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mixed: Tensor | None = None
        for index, expert in enumerate(self):
            rows = (expert_ids_BK == index).any(dim=-1).nonzero().squeeze(-1)
            # An expert that no image chose still runs, on zero rows: its parameters then have a
            # gradient of zeros on every process, which gradient reduction across processes needs.
            output = expert(x.index_select(0, rows), *args, **kwargs)
            output = output * _per_image(weights_BE[rows, index], output)
            start = output.new_zeros(x.shape[0], *output.shape[1:]) if mixed is None else mixed
            mixed = start.index_add(0, rows, output)
        assert mixed is not None
        return mixed


def _per_image(weight_B: Tensor, output: Tensor) -> Tensor:
    return weight_B.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
