"""The experts: copies of a pretrained FFN, run on the images that chose them.

Shapes: B images (T tokens in the place of B where they are packed), N tokens of an image, D embed_dim, E experts,
K top_k.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from covft.nn.functional import per_image
from covft.nn.fused import mix, needs_plain_operations, weights_to_mix
from covft.nn.plan import FFNPlan
from covft.nn.router import Routing
from covft.utils.torch_internals import is_transformed


class Experts(nn.ModuleList):
    r"""FFNs whose outputs are mixed with one set of weights per image, $\sum_e g_e E_e(x)$.

    Any FFN module can be an expert: it is called with the tokens and whatever else the block passes to its FFN. Experts
    of the form linear, activation, linear (or gated) keep less for backward; others are called one by one.

    Attributes:
        recompute: What backward recomputes: `"none"`; `"activation"`, all but the products of the first linear layers,
            which are kept; `"all"`, where only the tokens are kept.
        kernels: What runs between the matrix products: `"auto"`, Triton kernels on a GPU where they can; or `"eager"`
            operations of torch.
        plan: How the experts compute, if it is known.
        unfused_reason: Why it is not known.
        skip_below: In eval mode, experts with smaller weights are skipped for an image; 0 skips none.
        run_all: Whether experts run on images that have not chosen them too, with weights of zero, as in a graph whose
            shapes do not depend on values.
    """

    recompute: str = "none"
    kernels: str = "auto"
    skip_below: float = 0.0
    run_all: bool = False
    plan: FFNPlan | None = None
    unfused_reason: str = "it was not looked for"

    @classmethod
    def upcycled(cls, ffn: nn.Module, num_experts: int, *, plans: dict[Any, Any] | None = None) -> Experts:
        """Make experts that are exact, trainable copies of a pretrained FFN.

        Args:
            ffn: The FFN; copied, never changed.
            num_experts: Number of copies E.
            plans: Plans of FFNs of the same ViT by their form, a cache that is added to.
        """
        experts = cls(copy.deepcopy(ffn) for _ in range(num_experts))
        for parameter in experts.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        plans, form = {} if plans is None else plans, FFNPlan.form_of(ffn)
        if form not in plans:
            plans[form] = FFNPlan.of(ffn)
        experts.plan, experts.unfused_reason = plans[form]
        return experts

    @property
    def prototype(self) -> nn.Module:
        """The first expert, which foreign code sees in the place of the FFN."""
        return self[0]

    @property
    def summary(self) -> str:
        """Recomputation, and the reason for calling experts one by one if there is one, for `print`."""
        return f"recompute={self.recompute!r}" + ("" if self.plan else f", one by one: {self.unfused_reason}")

    def forward(self, x: Tensor, routing: Routing, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts and mix.

        Args:
            x: Tokens, shape `(B, ...)`, such as `(B, N, D)`.
            routing: One decision per image.
            *args: Passed to every expert.
            **kwargs: Passed to every expert.

        Returns:
            The mixture, in the shape and type of the FFN's output.
        """
        weights_BE, chosen_BE = routing.weights_BE, None
        if routing.expert_ids_BK is not None:
            chosen_BE = torch.zeros_like(weights_BE, dtype=torch.bool).scatter(1, routing.expert_ids_BK, True)
        elif self.skip_below and not self.training:
            chosen_BE = weights_BE >= self.skip_below
            weights_BE = weights_BE * chosen_BE
            weights_BE = weights_BE / weights_BE.sum(dim=-1, keepdim=True)
        # Where rows cannot be chosen by value, all experts run: the unchosen have weights of zero.
        transformed = not torch.compiler.is_compiling() and is_transformed()
        if chosen_BE is None or self.run_all or transformed:
            return self._mix(x, weights_BE, list(self), *args, **kwargs)
        mixed: Any = None
        for index, expert in enumerate(self):
            rows = chosen_BE[:, index].nonzero().squeeze(-1)
            # An expert that no image chose still runs, on zero rows: its parameters then have a gradient of zeros on
            # every process, which gradient reduction across processes needs.
            weights_B1 = weights_BE[rows, index : index + 1]
            output = self._mix(x.index_select(0, rows), weights_B1, [expert], *args, **kwargs)
            start = output.new_zeros(x.shape[0], *output.shape[1:]) if mixed is None else mixed
            mixed = start.index_add(0, rows, output)
        return mixed

    def _mix(self, x: Tensor, weights_BE: Tensor, experts: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Tensor:
        weights = None if self.recompute == "none" or args or kwargs else weights_to_mix(self.plan, experts)
        if weights is not None:
            assert self.plan is not None
            keep = self.recompute == "activation"
            return mix(x, weights_BE, experts, self.plan, weights, keep_pre_activations=keep, kernels=self.kernels)
        mixed: Any = None
        for weight_B, expert in zip(weights_BE.unbind(-1), experts, strict=True):
            if self.recompute == "all" and torch.is_grad_enabled() and not needs_plain_operations():
                output = checkpoint(Repeatable(expert), x, *args, use_reentrant=False, **kwargs)
            else:
                output = expert(x, *args, **kwargs)
            weight = per_image(weight_B, output)
            mixed = output * weight if mixed is None else torch.addcmul(mixed, output, weight)
        return mixed


class Repeatable:
    """Calls an expert, and in backward again with the weights of the first call, which `functional_call` may have lent.

    Args:
        expert: The expert.
    """

    def __init__(self, expert: nn.Module) -> None:
        self.expert = expert
        self.weights: dict[str, Tensor] = dict(expert.named_parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the expert with the weights of the first call."""
        now = dict(self.expert.named_parameters())
        if all(now.get(name) is weight for name, weight in self.weights.items()):
            return self.expert(*args, **kwargs)
        return functional_call(self.expert, self.weights, args, kwargs)
