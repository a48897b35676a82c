# ruff: noqa: ANN001, ANN202 - arguments of kernels are pointers and numbers of any type
"""Triton kernels for what an FFN computes between its matrix products; each reads and writes every tensor once.

They compute in float32, or in float64 where the tensors are. Importing this module needs Triton.

Shapes: T tokens, F ffn_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The functions that the kernels know, by their names in `FFNPlan`.
FUNCTIONS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "silu": 3}
_BLOCK = 1024  # columns at a time


@triton.jit
def _number(value: tl.constexpr, like):
    """Return a number in the type of a block; beside a block of float64, Triton would round it to float32."""
    return tl.full((1,), value, like.dtype)


@triton.jit
def _cdf_like(x, FUNCTION: tl.constexpr):
    """Return s(x) of the activation x s(x), and its derivative s'(x)."""
    if FUNCTION == 0:  # the normal distribution and its density
        s = 0.5 * (1.0 + tl.erf(x * _number(0.7071067811865476, x)))
        ds = _number(0.3989422804014327, x) * tl.exp(-0.5 * x * x)
    else:  # sigmoid(u(x))
        if FUNCTION == 1:  # (1 + tanh(v)) / 2 is sigmoid(2 v)
            scale = _number(1.5957691216057308, x)
            u = scale * (x + _number(0.044715, x) * x * x * x)
            du = scale * (1.0 + _number(0.134145, x) * x * x)
        elif FUNCTION == 2:
            du = _number(1.702, x)
            u = du * x
        else:
            u, du = x, 1.0
        s = 1.0 / (1.0 + tl.exp(-u))
        ds = s * (1.0 - s) * du
    return s, ds


@triton.jit
def _forward(p_ptr, q_ptr, weight_ptr, hidden_ptr, stride, hidden_stride, weight_stride, per_image, F,
             FUNCTION: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write `weight * act(p)`, or `weight * act(p) * q`, of one token and one block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < F
    p = tl.load(p_ptr + row * stride + columns, mask=there, other=0.0).to(WIDE)
    s, _ = _cdf_like(p, FUNCTION)
    hidden = p * s * tl.load(weight_ptr + row // per_image * weight_stride).to(WIDE)
    if GATED:
        hidden *= tl.load(q_ptr + row * stride + columns, mask=there, other=0.0).to(WIDE)
    tl.store(hidden_ptr + row * hidden_stride + columns, hidden, mask=there)


@triton.jit
def _backward(p_ptr, q_ptr, grad_ptr, weight_ptr, grad_p_ptr, grad_q_ptr, grad_weight_ptr, stride, weight_stride,
              per_image, F, FUNCTION: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Write the forward's result over its gradient, the gradients of p and q, and that of the weight, of one token.

    The gradients of p and q may go where p and q are.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row // per_image * weight_stride).to(WIDE)
    total = tl.zeros((BLOCK,), WIDE)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        there = columns < F
        p = tl.load(p_ptr + row * stride + columns, mask=there, other=0.0).to(WIDE)
        grad = tl.load(grad_ptr + row * F + columns, mask=there, other=0.0).to(WIDE)
        s, ds = _cdf_like(p, FUNCTION)
        hidden, slope = p * s, s + p * ds
        if GATED:
            q = tl.load(q_ptr + row * stride + columns, mask=there, other=0.0).to(WIDE)
            tl.store(grad_q_ptr + row * stride + columns, weight * grad * hidden, mask=there)
            hidden, slope = hidden * q, slope * q
        total += grad * hidden
        tl.store(grad_ptr + row * F + columns, weight * hidden, mask=there)
        tl.store(grad_p_ptr + row * stride + columns, weight * grad * slope, mask=there)
    tl.store(grad_weight_ptr + row, tl.sum(total, axis=0))


INTERPRETED = not isinstance(_forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1: on the CPU, in Python


def activate(
    pre: Sequence[Tensor], kind: str, function: str, weight_B: Tensor, per_image: int = 1, *, in_place: bool = False
) -> Tensor:
    """Compute what comes between the linear layers, times a weight per image.

    Args:
        pre: Outputs of the first linear layers, shape `(T, F)`, or one of shape `(T, 2F)`.
        kind: As in `FFNPlan`.
        function: A name in `FUNCTIONS`.
        weight_B: Weights, shape `(B,)`.
        per_image: Tokens of an image, T / B.
        in_place: Whether the result may go where `pre` is.

    Returns:
        Shape `(T, F)`, in the type of `pre`.
    """
    p, q = _in_order(pre, kind)
    tokens, width = p.shape
    hidden = p if in_place else p.new_empty(tokens, width)
    if tokens:
        grid = (tokens, triton.cdiv(width, _BLOCK))
        sizes = p.stride(0), hidden.stride(0), weight_B.stride(0), per_image, width
        _forward[grid](p, q, weight_B, hidden, *sizes, **_options(p, kind, function))
    return hidden


def activate_backward(
    pre: Sequence[Tensor],
    kind: str,
    function: str,
    weight_B: Tensor,
    grad_TF: Tensor,
    per_image: int = 1,
    *,
    in_place: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Compute the gradients of `activate`, and write what it returned over its gradient.

    Args:
        pre: As in `activate`.
        kind: As in `activate`.
        function: As in `activate`.
        weight_B: As in `activate`.
        grad_TF: Gradient of what `activate` returned, contiguous; afterwards what it returned.
        per_image: As in `activate`.
        in_place: Whether the gradients of `pre` may go where `pre` is.

    Returns:
        The gradients of `pre`; for each token its share of the gradient of the weight, shape `(T,)`, float32 or wider.
    """
    p, q = _in_order(pre, kind)
    tokens, width = p.shape
    grads = list(pre) if in_place else [torch.empty_like(each) for each in pre]
    grad_p, grad_q = _in_order(grads, kind)
    grad_weight_T = grad_TF.new_empty(tokens, dtype=torch.promote_types(grad_TF.dtype, torch.float32))
    if tokens:
        sizes = p.stride(0), weight_B.stride(0), per_image, width
        _backward[(tokens,)](
            p, q, grad_TF, weight_B, grad_p, grad_q, grad_weight_T, *sizes, **_options(p, kind, function)
        )
    return grads, grad_weight_T


def _in_order(pre: Sequence[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Return what is activated, and what it is multiplied with (itself where there is nothing); of one row stride."""
    both = tuple(pre[0].chunk(2, dim=-1)) if kind.endswith("_halves") else tuple(pre)
    return (both[-1], both[0]) if kind.startswith("gate_last") else (both[0], both[-1])


def _options(p: Tensor, kind: str, function: str) -> dict[str, Any]:
    return _constants(p.dtype, kind, function, _BLOCK)


@functools.cache
def _constants(dtype: torch.dtype, kind: str, function: str, block: int) -> dict[str, Any]:
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    return {"FUNCTION": FUNCTIONS[function], "GATED": kind != "plain", "WIDE": wide, "BLOCK": block}
