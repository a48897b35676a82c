"""A mixture of experts that keeps for backward only what is expensive to recompute.

Autograd keeps the inputs of every operation of every expert: pre-activations, activations, output. This mixture keeps
the tokens once, with or without the pre-activations, and recomputes the rest in backward. Its results are those of the
experts run one by one.

Shapes: B images, T tokens of all images, D embed_dim, F ffn_dim, E experts.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covft.nn.functional import autocasts, per_image, without_autocast
from covft.nn.plan import Between, FFNPlan, pairs, run_ffn
from covft.utils.torch_internals import is_transformed

# Rows per block on a CPU, so that intermediates stay in its caches and their memory is reused.
_ROWS = 512


def weights_to_mix(plan: FFNPlan | None, experts: Sequence[nn.Module]) -> list[Tensor | None] | None:
    """Return the weights that `mix` needs of these experts, or None where it cannot run them now."""
    if plan is None or needs_plain_operations():
        return None
    found: list[Tensor | None] = []
    for expert in experts:
        weights = plan.weights_now(expert)
        if weights is None:
            return None
        found += weights
    return found


def needs_plain_operations() -> bool:
    """Return whether nothing may be recomputed.

    The compiler decides by itself what to recompute; transforms of torch.func and forward-mode derivatives follow
    single operations.
    """
    return torch.compiler.is_compiling() or is_transformed()


def mix(
    x: Tensor,
    weights_BE: Tensor,
    experts: Sequence[nn.Module],
    plan: FFNPlan,
    weights: Sequence[Tensor | None] | None = None,
    *,
    keep_pre_activations: bool,
    kernels: str = "auto",
) -> Tensor:
    """Run experts of one plan on tokens of shape `(B, ..., D)`, and mix their outputs, same shape.

    The weights are what `weights_to_mix` returned, where it was asked. Backward recomputes the pre-activations unless
    they are kept. Between the matrix products Triton kernels run where they can: with `kernels="auto"` on a GPU; with
    `"triton"` in Triton's interpreter too; with `"eager"` nowhere.
    """
    if weights is None:
        weights = [tensor for expert in experts for tensor in plan.weights(expert)]
    autocast = autocasts(x.device.type)
    settings = Settings(
        tuple(plan.between(expert) for expert in experts),
        keep_pre_activations and torch.is_grad_enabled(),
        torch.get_autocast_dtype(x.device.type) if autocast else None,
    )
    mixture: Any = _Mixture
    if (kernels == "triton" or (kernels == "auto" and x.is_cuda)) and has_triton():
        from covft.nn import kernel_mixture

        if kernel_mixture.can_run(x, settings.between):
            mixture = kernel_mixture.KernelMixture
    return mixture.apply(x, weights_BE, settings, *weights)  # type: ignore[no-any-return]


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed; torch for CUDA brings it along."""
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Settings:
    """What a mixture needs besides tensors."""

    between: tuple[Between, ...]
    keep_pre_activations: bool
    autocast_dtype: torch.dtype | None

    def cast(self, tensor: Any) -> Any:
        """Cast a tensor as autocast does for a linear layer."""
        if tensor is None or self.autocast_dtype is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(self.autocast_dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights_BE: Tensor, settings: Settings, *weights: Tensor | None) -> Tensor:
        tokens = settings.cast(x)
        tokens_TD = tokens.reshape(-1, x.shape[-1])
        blocks, weights_TE = _blocks(tokens_TD), per_token(weights_BE, tokens_TD)
        kept: list[Tensor] = []
        mixed_TD: Any = None
        with without_autocast(x.device.type):
            for e, own in enumerate(per_expert(weights, settings)):
                *first, last, bias = map(settings.cast, own)
                layers, between = pairs(first), settings.between[e]
                to_keep = layers if settings.keep_pre_activations else []
                own_kept = [tokens_TD.new_empty(len(tokens_TD), len(matrix)) for matrix, _ in to_keep]
                kept += own_kept
                for rows in blocks:
                    x_TD, outs = tokens_TD[rows], [all_rows[rows] for all_rows in own_kept] or [None] * len(layers)
                    pre = [
                        affine(x_TD, *layer, between.scale, out=out) for layer, out in zip(layers, outs, strict=True)
                    ]
                    output = affine(between.scaled(*pre), last, bias, 1, 1 / between.scale)
                    if mixed_TD is None:
                        mixed_TD = output.new_zeros(len(tokens_TD), output.shape[-1])
                    mixed_TD[rows].addcmul_(output, weights_TE[rows, e : e + 1].to(output.dtype))
        ctx.settings, ctx.shape, ctx.dtype = settings, x.shape, x.dtype
        ctx.present = [weight is not None for weight in weights]
        ctx.save_for_backward(tokens, weights_BE, *(w for w in weights if w is not None), *kept)
        return mixed_TD.view(*x.shape[:-1], mixed_TD.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return differentiable_backward(ctx, grads[0])
        settings: Settings = ctx.settings
        tokens, weights_BE, *saved = ctx.saved_tensors
        tokens_TD = tokens.reshape(-1, tokens.shape[-1])
        weights, kept = unpack(saved, ctx.present)
        needs_x, needs_routing, _, *needs = ctx.needs_input_grad
        grad_TD = grads[0].reshape(-1, grads[0].shape[-1])
        blocks, weights_TE = _blocks(tokens_TD), per_token(weights_BE, tokens_TD)
        grad_x_TD = torch.zeros_like(tokens_TD) if needs_x else None
        wide = torch.promote_types(weights_TE.dtype, torch.float32)
        grad_routing_TE = torch.zeros_like(weights_TE, dtype=wide) if needs_routing else None
        grad_weights: list[Tensor | None] = []
        scratch = _Scratch(blocks)
        with without_autocast(grad_TD.device.type):
            for e, own in enumerate(per_expert(weights, settings)):
                *first, last, bias = map(settings.cast, own)
                layers, between = pairs(first), settings.between[e]
                *needed, last_needed, bias_needed = needs[e * len(own) : (e + 1) * len(own)]
                weight_T1 = weights_TE[:, e : e + 1].to(grad_TD.dtype)
                for rows in blocks:
                    if settings.keep_pre_activations:
                        pre = [all_rows[rows] for all_rows in kept[e * len(layers) : (e + 1) * len(layers)]]
                    else:
                        pre = [affine(tokens_TD[rows], *layer, between.scale) for layer in layers]
                    with torch.enable_grad():
                        leaves = [p.detach().requires_grad_() for p in pre]
                        hidden = between.scaled(*leaves)
                    grad_hidden = grad_TD[rows] @ last
                    if grad_routing_TE is not None:
                        products = torch.linalg.vecdot(grad_hidden, hidden.detach()).div_(between.scale)
                        grad_routing_TE[rows, e] = products if bias is None else products + grad_TD[rows] @ bias
                    # `leaves` and `hidden` are both scaled by `scale`, so the derivative between them is unchanged.
                    grad_pre = torch.autograd.grad(hidden, leaves, grad_hidden.mul_(weight_T1[rows]))
                    if last_needed:
                        scratch.keep("hidden", rows, hidden.detach())
                    for number, (grad, (matrix, _)) in enumerate(zip(grad_pre, layers, strict=True)):
                        if grad_x_TD is not None:
                            grad_x_TD[rows].addmm_(grad, matrix)
                        if any(needed[2 * number : 2 * number + 2]):
                            scratch.keep(number, rows, grad)
                for number in range(len(layers)):
                    of_weight, of_bias = needed[2 * number : 2 * number + 2]
                    grad_weights.append(scratch[number].t() @ tokens_TD if of_weight else None)
                    grad_weights.append(scratch[number].sum(0) if of_bias else None)
                weighed_TD = grad_TD * (weight_T1 / between.scale) if last_needed or bias_needed else grad_TD
                grad_weights.append(weighed_TD.t() @ scratch["hidden"] if last_needed else None)
                grad_weights.append(weighed_TD.sum(0) * between.scale if bias_needed else None)
        return (
            None if grad_x_TD is None else grad_x_TD.to(ctx.dtype).view(ctx.shape),
            None if grad_routing_TE is None else sum_per_image(grad_routing_TE, weights_BE),
            None,
            *(None if g is None or w is None else g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)),
        )


class _Scratch(dict[Any, Tensor]):
    """Tensors that backward fills block by block and multiplies at once; each expert reuses the memory."""

    def __init__(self, blocks: list[slice]) -> None:
        self.blocks = blocks

    def keep(self, key: Any, rows: slice, block: Tensor) -> None:
        if len(self.blocks) == 1:
            self[key] = block
            return
        if key not in self:
            self[key] = block.new_empty(self.blocks[-1].stop, block.shape[-1])
        self[key][rows] = block


def differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Run backward for `create_graph=True`: the experts run one by one again, and autograd does the rest."""
    settings: Settings = ctx.settings
    if settings.autocast_dtype is not None:
        raise NotImplementedError(
            "A second derivative of fused experts is not available under autocast; wrap with recompute='none'."
        )
    x, weights_BE, *saved = ctx.saved_tensors
    weights, _ = unpack(saved, ctx.present)
    mixed: Any = 0
    for e, own in enumerate(per_expert(weights, settings)):
        output = run_ffn(x, own, settings.between[e])
        mixed = mixed + output * per_image(weights_BE[:, e], output)
    inputs = [x, weights_BE, None, *weights]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    found = torch.autograd.grad(mixed, [inputs[i] for i in wanted], grad, create_graph=True)
    grads = dict(zip(wanted, found, strict=True))
    return tuple(grads.get(i) for i in range(len(inputs)))


def per_expert(weights: Sequence[Any], settings: Settings) -> list[Sequence[Any]]:
    """Return the weights of each expert."""
    size = len(weights) // len(settings.between)
    return [weights[start : start + size] for start in range(0, len(weights), size)]


def unpack(saved: Sequence[Tensor], present: Sequence[bool]) -> tuple[list[Tensor | None], list[Tensor]]:
    """Return the weights, with None where a layer has no bias, and the pre-activations."""
    rest = iter(saved)
    return [next(rest) if there else None for there in present], list(rest)


def affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, product: float | None = None, out: Any = None
) -> Tensor:
    """Run a linear layer with its bias and its product scaled, which costs nothing."""
    product = scale if product is None else product
    if bias is None:
        return torch.mm(x, weight.t(), out=out).mul_(product)
    return torch.addmm(bias, x, weight.t(), beta=scale, alpha=product, out=out)


def _blocks(tokens_TD: Tensor) -> list[slice]:
    """Split the rows into blocks: on a CPU as many rows as its caches hold, else all."""
    total = len(tokens_TD)
    size = _ROWS if tokens_TD.device.type == "cpu" else max(total, 1)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)] or [slice(0, 0)]


def per_token(weights_BE: Tensor, tokens_TD: Tensor) -> Tensor:
    """Give each token the weights of its image, shape `(T, E)`."""
    return weights_BE.repeat_interleave(len(tokens_TD) // max(len(weights_BE), 1), dim=0)


def sum_per_image(grad_TE: Tensor, weights_BE: Tensor) -> Tensor:
    """Sum over the tokens of each image, shape `(B, E)`."""
    images, experts = weights_BE.shape
    return grad_TE.view(images, len(grad_TE) // max(images, 1), experts).sum(1).to(weights_BE.dtype)
