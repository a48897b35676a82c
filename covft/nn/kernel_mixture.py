"""The fused mixture with Triton kernels between its matrix products.

The routing weight is applied to an expert's inner tokens, not to its output, so that the last product adds to the sum
of the experts by itself.

Shapes: B images, T tokens of all images, D embed_dim, F ffn_dim, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from covft.nn.functional import without_autocast
from covft.nn.fused import (
    Settings,
    affine,
    differentiable_backward,
    per_expert,
    per_token,
    sum_per_image,
    unpack,
)
from covft.nn.kernels import FUNCTIONS, INTERPRETED, activate, activate_backward
from covft.nn.plan import Between, pairs


def can_run(x: Tensor, between: Sequence[Between]) -> bool:
    """Return whether the kernels know these activations, on this device."""
    return (x.is_cuda or INTERPRETED) and all(each.function in FUNCTIONS for each in between)


class KernelMixture(torch.autograd.Function):
    """As `_Mixture` in `covft.nn.fused`, all tokens at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights_BE: Tensor, settings: Settings, *weights: Tensor | None) -> Tensor:
        """Return the mixture, in the shape of `x`."""
        tokens = settings.cast(x)
        tokens_TD = tokens.reshape(-1, x.shape[-1])
        weights_ET = per_token(weights_BE, tokens_TD).t().contiguous()
        kept: list[Tensor] = []
        mixed_TD: Any = None
        with without_autocast(x.device.type):
            for e, own in enumerate(per_expert(weights, settings)):
                *first, last, bias = map(settings.cast, own)
                between: Any = settings.between[e]
                pre = [affine(tokens_TD, *layer, 1) for layer in pairs(first)]
                hidden_TF = activate(pre, between.kind, between.function, weights_ET[e])
                if mixed_TD is None:
                    mixed_TD = hidden_TF.new_zeros(len(tokens_TD), len(last))
                if bias is not None:
                    mixed_TD.addcmul_(weights_ET[e, :, None].to(bias.dtype), bias)
                mixed_TD.addmm_(hidden_TF, last.t())
                kept += pre if settings.keep_pre_activations else []
        ctx.settings, ctx.shape, ctx.dtype = settings, x.shape, x.dtype
        ctx.present = [weight is not None for weight in weights]
        ctx.save_for_backward(tokens, weights_BE, *(w for w in weights if w is not None), *kept)
        return mixed_TD.view(*x.shape[:-1], mixed_TD.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, routing weights and parameters."""
        if torch.is_grad_enabled():
            return differentiable_backward(ctx, grads[0])
        settings: Settings = ctx.settings
        tokens, weights_BE, *saved = ctx.saved_tensors
        tokens_TD = tokens.reshape(-1, tokens.shape[-1])
        weights, kept = unpack(saved, ctx.present)
        needs_x, _, _, *needs = ctx.needs_input_grad
        grad_TD = grads[0].reshape(-1, grads[0].shape[-1])
        weights_ET = per_token(weights_BE, tokens_TD).t().contiguous()
        grad_x_TD = torch.zeros_like(tokens_TD) if needs_x else None
        grad_routing: list[Tensor] = []
        grad_weights: list[Tensor | None] = []
        with without_autocast(grad_TD.device.type):
            for e, own in enumerate(per_expert(weights, settings)):
                *first, last, bias = map(settings.cast, own)
                layers, between, weight_T = pairs(first), settings.between[e], weights_ET[e]
                *needed, last_needed, bias_needed = needs[e * len(own) : (e + 1) * len(own)]
                pre = kept[e * len(layers) : (e + 1) * len(layers)]
                pre = pre or [affine(tokens_TD, *layer, 1) for layer in layers]
                assert between.function is not None
                hidden_TF, grad_pre, grad_weight_T = activate_backward(
                    pre, between.kind, between.function, weight_T, grad_TD @ last
                )
                grad_routing.append(grad_weight_T if bias is None else grad_weight_T + grad_TD @ bias)
                for number, (grad, (matrix, _)) in enumerate(zip(grad_pre, layers, strict=True)):
                    of_weight, of_bias = needed[2 * number : 2 * number + 2]
                    if grad_x_TD is not None:
                        grad_x_TD.addmm_(grad, matrix)
                    grad_weights.append(grad.t() @ tokens_TD if of_weight else None)
                    grad_weights.append(grad.sum(0) if of_bias else None)
                grad_weights.append(grad_TD.t() @ hidden_TF if last_needed else None)
                grad_weights.append(weight_T.to(grad_TD.dtype) @ grad_TD if bias_needed else None)
        return (
            None if grad_x_TD is None else grad_x_TD.to(ctx.dtype).view(ctx.shape),
            sum_per_image(torch.stack(grad_routing, dim=1), weights_BE) if ctx.needs_input_grad[1] else None,
            None,
            *(None if g is None or w is None else g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)),
        )
