"""A mixture of experts that keeps for backward only what cannot be had again cheaply.

Autograd keeps, for every expert, what goes into each of its operations: pre-activations, activations, output. This
mixture keeps the tokens once and the pre-activations, or the tokens alone, and makes the rest again in backward. Its
results are those of the experts run one by one.

Shapes: B images, T tokens of all images, D embed_dim, F ffn_dim, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from covft.nn.plan import FFNPlan, pairs, run_ffn


def mix(
    x: Tensor, weights_BE: Tensor, experts: Sequence[nn.Module], plan: FFNPlan, *, keep_pre_activations: bool
) -> Tensor:
    """Run experts of one plan on the same tokens, and mix them.

    Args:
        x: Tokens, shape `(B, ..., D)`.
        weights_BE: Weights of the experts, shape `(B, E)`.
        experts: The experts.
        plan: Their plan, which applies to all of them.
        keep_pre_activations: Whether backward gets them from memory; else it computes them again.

    Returns:
        The mixture, shape `(B, ..., D)`, in the type that the experts return.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    weights = [tensor for expert in experts for tensor in plan.weights(expert)]
    settings = _Settings(
        tuple(plan.between(expert) for expert in experts),
        keep_pre_activations,
        torch.get_autocast_dtype(x.device.type) if autocast else None,
    )
    return _Mixture.apply(x, weights_BE, settings, *weights)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Settings:
    between: tuple[Callable[..., Tensor], ...]
    keep_pre_activations: bool
    autocast_dtype: torch.dtype | None

    def cast(self, tensor: Any) -> Any:
        """A tensor as autocast would hand it to a linear layer."""
        if tensor is None or self.autocast_dtype is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(self.autocast_dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights_BE: Tensor, settings: _Settings, *weights: Tensor | None) -> Tensor:
        tokens = settings.cast(x)
        tokens_TD = tokens.reshape(-1, x.shape[-1])
        by_image = (weights_BE.shape[0], math.prod(x.shape[1:-1]))
        kept: list[Tensor] = []
        mixed: Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            for e, own in enumerate(_per_expert(weights, settings)):
                *first, last, bias = map(settings.cast, own)
                pre = [linear(tokens_TD, w, b) for w, b in pairs(first)]
                output = linear(settings.between[e](*pre), last, bias)
                if settings.keep_pre_activations:
                    kept += pre
                output = output.view(*by_image, output.shape[-1])
                weight = weights_BE[:, e].to(output.dtype).view(-1, 1, 1)
                mixed = output * weight if mixed is None else mixed.addcmul_(output, weight)
        assert mixed is not None
        ctx.settings, ctx.shape, ctx.dtype, ctx.by_image = settings, x.shape, x.dtype, by_image
        ctx.present = [weight is not None for weight in weights]
        ctx.save_for_backward(tokens, weights_BE, *(w for w in weights if w is not None), *kept)
        return mixed.view(*x.shape[:-1], mixed.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grads[0])
        settings: _Settings = ctx.settings
        tokens, weights_BE, *saved = ctx.saved_tensors
        tokens_TD = tokens.reshape(-1, tokens.shape[-1])
        weights, kept = _unpack(saved, ctx.present)
        needs_x, needs_routing, _, *needs = ctx.needs_input_grad
        grad_TD = grads[0].reshape(-1, grads[0].shape[-1])
        by_image = ctx.by_image
        grad_x: Tensor | None = None
        grad_routing: list[Tensor] = []
        grad_weights: list[Tensor | None] = []
        per_expert = _per_expert(weights, settings)
        with torch.autocast(grad_TD.device.type, enabled=False):
            for e, own in enumerate(per_expert):
                *first, last, bias = map(settings.cast, own)
                layers = pairs(first)
                if settings.keep_pre_activations:
                    pre = kept[e * len(layers) : (e + 1) * len(layers)]
                else:
                    pre = [linear(tokens_TD, w, b) for w, b in layers]
                with torch.enable_grad():
                    leaves = [p.detach().requires_grad_() for p in pre]
                    hidden = settings.between[e](*leaves)
                weight = weights_BE[:, e].to(grad_TD.dtype).view(-1, 1, 1)
                weighed_TD = (grad_TD.view(*by_image, grad_TD.shape[-1]) * weight).view_as(grad_TD)
                grad_hidden = grad_TD @ last
                if needs_routing:
                    grad_routing.append(
                        _dot(grad_hidden, hidden.detach(), by_image) + _bias_dot(grad_TD, bias, by_image)
                    )
                scaled = grad_hidden.view(*by_image, grad_hidden.shape[-1]).mul_(weight).view_as(grad_hidden)
                grad_pre = torch.autograd.grad(hidden, leaves, scaled)
                needed = needs[e * len(own) : (e + 1) * len(own)]
                for number, grad in enumerate(grad_pre):
                    of_weight, of_bias = needed[2 * number : 2 * number + 2]
                    grad_weights.append(grad.t() @ tokens_TD if of_weight else None)
                    grad_weights.append(grad.sum(0) if of_bias else None)
                    if needs_x:
                        matrix = layers[number][0]
                        grad_x = grad @ matrix if grad_x is None else grad_x.addmm_(grad, matrix)
                grad_weights.append(weighed_TD.t() @ hidden.detach() if needed[-2] else None)
                grad_weights.append(weighed_TD.sum(0) if needed[-1] else None)
        return (
            None if grad_x is None else grad_x.to(ctx.dtype).view(ctx.shape),
            torch.stack(grad_routing, dim=-1).to(weights_BE.dtype) if needs_routing else None,
            None,
            *(None if g is None or w is None else g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)),
        )


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Backward for `create_graph=True`: the experts are run one by one again, and autograd does the rest."""
    settings: _Settings = ctx.settings
    if settings.autocast_dtype is not None:
        raise NotImplementedError(
            "A second derivative of fused experts is not available under autocast; wrap with recompute='none'."
        )
    x, weights_BE, *saved = ctx.saved_tensors
    weights, _ = _unpack(saved, ctx.present)
    mixed: Any = 0
    for e, own in enumerate(_per_expert(weights, settings)):
        output = run_ffn(x, own, settings.between[e])
        mixed = mixed + output * weights_BE[:, e].to(output.dtype).view(-1, *[1] * (output.dim() - 1))
    inputs = [x, weights_BE, None, *weights]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    found = torch.autograd.grad(mixed, [inputs[i] for i in wanted], grad, create_graph=True)
    grads = dict(zip(wanted, found, strict=True))
    return tuple(grads.get(i) for i in range(len(inputs)))


def _per_expert(weights: Sequence[Any], settings: _Settings) -> list[Sequence[Any]]:
    size = len(weights) // len(settings.between)
    return [weights[start : start + size] for start in range(0, len(weights), size)]


def _unpack(saved: Sequence[Tensor], present: Sequence[bool]) -> tuple[list[Tensor | None], list[Tensor]]:
    """The weights, with None where a layer has no bias, and the pre-activations."""
    rest = iter(saved)
    return [next(rest) if there else None for there in present], list(rest)


def _dot(one: Tensor, other: Tensor, by_image: tuple[int, int]) -> Tensor:
    """Per image, the sum of products, shape `(B,)`."""
    width = by_image[1] * one.shape[-1]
    return torch.linalg.vecdot(one.reshape(by_image[0], width), other.reshape(by_image[0], width))


def _bias_dot(grad_TD: Tensor, bias: Tensor | None, by_image: tuple[int, int]) -> Tensor | float:
    if bias is None:
        return 0.0
    return grad_TD.view(*by_image, grad_TD.shape[-1]).sum(1) @ bias
