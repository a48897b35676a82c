"""The fused mixture with Triton kernels between its matrix products.

The routing weight is applied to an expert's inner tokens, not to its output, so that the last product adds to the sum
of the experts by itself. Kernels write over what they have read, so that a mixture needs little more memory than one
expert; and there are few of them, since starting one takes the processor as long as a small one takes the GPU.

Shapes: B images, T tokens of all images, D embed_dim, F ffn_dim, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from covft.nn.functional import without_autocast
from covft.nn.fused import Settings, affine, differentiable_backward, per_expert, unpack
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
        keep, per_image = settings.keep_pre_activations, _per_image(tokens_TD, weights_BE)
        kept: list[Tensor] = []
        with without_autocast(x.device.type):
            mixed_TD: Any = _mixed_biases(weights_BE, _biases(weights, settings), per_image, tokens.dtype)
            for weight_B, between, own in zip(
                weights_BE.unbind(1), settings.between, per_expert(weights, settings), strict=True
            ):
                *first, last, _ = map(settings.cast, own)
                pre = [affine(tokens_TD, *layer, 1) for layer in pairs(first)]
                assert between.function is not None
                hidden_TF = activate(pre, between.kind, between.function, weight_B, per_image, in_place=not keep)
                product = (hidden_TF, last.t())
                mixed_TD = torch.mm(*product) if mixed_TD is None else mixed_TD.addmm_(*product)
                kept += pre if keep else []
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
        needs_x, needs_routing, _, *needs = ctx.needs_input_grad
        grad_TD = grads[0].reshape(-1, grads[0].shape[-1])
        per_image = _per_image(tokens_TD, weights_BE)
        grad_x_TD: Any = None
        grad_routing_ET: list[Tensor] = []
        grad_weights: list[Tensor | None] = []
        with without_autocast(grad_TD.device.type):
            grad_biases = _GradBiases(grad_TD, weights_BE, _biases(weights, settings), per_image)
            for e, (weight_B, own) in enumerate(zip(weights_BE.unbind(1), per_expert(weights, settings), strict=True)):
                *first, last, _ = map(settings.cast, own)
                layers, between = pairs(first), settings.between[e]
                *needed, last_needed, bias_needed = needs[e * len(own) : (e + 1) * len(own)]
                own_kept = kept[e * len(layers) : (e + 1) * len(layers)]
                pre = own_kept or [affine(tokens_TD, *layer, 1) for layer in layers]
                hidden_TF = torch.mm(grad_TD, last)  # its gradient, until the kernel has run
                assert between.function is not None
                grad_pre, grad_weight_T = activate_backward(
                    pre, between.kind, between.function, weight_B, hidden_TF, per_image, in_place=not own_kept
                )
                grad_routing_ET.append(grad_weight_T)
                for number, (grad, (matrix, _)) in enumerate(zip(grad_pre, layers, strict=True)):
                    of_weight, of_bias = needed[2 * number : 2 * number + 2]
                    if needs_x:
                        grad_x_TD = torch.mm(grad, matrix) if grad_x_TD is None else grad_x_TD.addmm_(grad, matrix)
                    grad_weights.append(grad.t() @ tokens_TD if of_weight else None)
                    grad_weights.append(grad.sum(0) if of_bias else None)
                grad_weights.append(grad_TD.t() @ hidden_TF if last_needed else None)
                grad_weights.append(grad_biases[e] if bias_needed else None)
            grad_routing_BE = None
            if needs_routing:
                sums_EB = torch.stack(grad_routing_ET).view(len(settings.between), len(weights_BE), per_image).sum(2)
                grad_routing_BE = grad_biases.add_to_routing(sums_EB.t()).to(weights_BE.dtype)
        return (
            None if grad_x_TD is None else grad_x_TD.to(ctx.dtype).view(ctx.shape),
            grad_routing_BE,
            None,
            *(None if g is None or w is None else g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)),
        )


def _per_image(tokens_TD: Tensor, weights_BE: Tensor) -> int:
    """Return the number of tokens of an image."""
    return len(tokens_TD) // max(len(weights_BE), 1)


def _biases(weights: Sequence[Any], settings: Settings) -> Tensor | None:
    """Return the biases of the last layers, shape `(E, D)`, zeros where an expert has none; None if none has one."""
    found = [own[-1] for own in per_expert(weights, settings)]
    there = next((bias for bias in found if bias is not None), None)
    if there is None:
        return None
    return torch.stack([torch.zeros_like(there) if bias is None else bias for bias in found])


def _mixed_biases(weights_BE: Tensor, biases_ED: Tensor | None, per_image: int, dtype: torch.dtype) -> Tensor | None:
    """Return for each token the weighted sum of the biases, shape `(T, D)`."""
    if biases_ED is None:
        return None
    wide = torch.promote_types(weights_BE.dtype, biases_ED.dtype)
    return (weights_BE.to(wide) @ biases_ED.to(wide)).to(dtype).repeat_interleave(per_image, dim=0)


class _GradBiases:
    """What the gradient of the output says of the biases, from its sum over the tokens of each image."""

    def __init__(self, grad_TD: Tensor, weights_BE: Tensor, biases_ED: Tensor | None, per_image: int) -> None:
        self.biases_ED = biases_ED
        if biases_ED is None:
            return
        wide = torch.promote_types(grad_TD.dtype, torch.float32)
        self.grad_BD = grad_TD.view(len(weights_BE), per_image, grad_TD.shape[-1]).sum(1, dtype=wide)
        self.grad_ED = weights_BE.to(wide).t() @ self.grad_BD

    def __getitem__(self, expert: int) -> Tensor:
        return self.grad_ED[expert]

    def add_to_routing(self, grad_BE: Tensor) -> Tensor:
        """Add the share of the biases to the gradient of the routing weights."""
        if self.biases_ED is None:
            return grad_BE
        return grad_BE + self.grad_BD @ self.biases_ED.to(self.grad_BD.dtype).t()
