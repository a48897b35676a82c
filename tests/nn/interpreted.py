"""The Triton kernels in Triton's interpreter, against experts one by one: `python -m tests.nn.interpreted [FORM ...]`.

Whether kernels are interpreted is decided when they are imported, hence a process of its own.
"""

from __future__ import annotations

import functools
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import nn

from covft.nn import ContextualMoE, kernels
from covft.nn.fused import mix
from covft.nn.kernel_mixture import KernelMixture, can_run
from covft.nn.plan import FFNPlan
from tests.helpers.ffns import FFNS, HIDDEN, D, E, Gated, QuickGELU, experts_like, one_by_one

KNOWN = {
    **{name: make for name, make in FFNS.items() if name not in ("mlp without biases", "function")},
    "gated quick": lambda: Gated(act=QuickGELU()),
    "gated tanh": lambda: Gated(last=True, act=nn.GELU(approximate="tanh")),
    "silu": lambda: nn.Sequential(nn.Linear(D, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, D)),
}


run = functools.partial(mix, kernels="triton")


def values_and_gradients(name: str, *, keep: bool) -> None:
    """Every form of an FFN, with more than one block of columns."""
    torch.manual_seed(0)
    ffn = KNOWN[name]()
    plan, reason = FFNPlan.of(ffn)
    assert plan is not None, reason
    experts = experts_like(ffn)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, E, dtype=torch.float64, requires_grad=True)
    inputs = [x, weights, *(p for expert in experts for p in expert.parameters())]
    wanted = one_by_one(x, weights, experts)
    assert can_run(x, [plan.between(expert) for expert in experts]), name
    found = run(x, weights, experts, plan, keep_pre_activations=keep)
    assert type(found.grad_fn).__name__ == f"{KernelMixture.__name__}Backward"
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream, retain_graph=not keep),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def unknown_activations_run_eagerly() -> None:
    for name in ("mlp without biases", "function"):
        plan, _ = FFNPlan.of(FFNS[name]())
        experts = experts_like(FFNS[name]())
        x, weights = torch.randn(2, 5, D, dtype=torch.float64), torch.rand(2, E, dtype=torch.float64)
        assert not can_run(x, [plan.between(expert) for expert in experts])
        found = run(x, weights, experts, plan, keep_pre_activations=False)
        torch.testing.assert_close(found, one_by_one(x, weights, experts))


def frozen_inputs_no_tokens_and_second_derivatives() -> None:
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    for parameter in experts[1].parameters():
        parameter.requires_grad_(False)
    x, weights = torch.randn(2, 4, D, dtype=torch.float64), torch.rand(2, E, dtype=torch.float64)
    run(x, weights, experts, plan, keep_pre_activations=True).square().sum().backward()
    assert all(p.grad is None for p in experts[1].parameters())
    assert all(p.grad.any() for p in experts[0].parameters())
    empty = run(x[:0], weights[:0], experts, plan, keep_pre_activations=True)
    empty.sum().backward()
    assert empty.shape == (0, 4, D)
    x.requires_grad_()
    alone = lambda x: run(x, weights[:, :1], experts[:1], plan, keep_pre_activations=False)  # noqa: E731
    assert torch.autograd.gradgradcheck(alone, (x,))


def half_precision_is_rounded_once() -> None:
    """Between the products the kernels round only what they write; in float16, as the interpreter cuts bfloat16 off."""
    pre, grad = torch.randn(3, HIDDEN).half(), torch.randn(3, HIDDEN).half()
    weight = torch.rand(3)
    p, w = pre.double().requires_grad_(), weight.double().requires_grad_()
    wanted = nn.functional.gelu(p) * w[:, None]
    of_p, of_w = torch.autograd.grad(wanted, (p, w), grad.double())
    half = {"rtol": 2**-10, "atol": 1e-6}
    torch.testing.assert_close(kernels.activate([pre], "plain", "gelu", weight).double(), wanted, **half)
    (grad_pre,), grad_weight = kernels.activate_backward([pre], "plain", "gelu", weight, grad)
    torch.testing.assert_close(grad.double(), wanted, **half)  # written over its gradient
    torch.testing.assert_close(grad_pre.double(), of_p, **half)
    torch.testing.assert_close(grad_weight.double(), of_w, rtol=1e-5, atol=1e-6)


def a_block_with_a_context() -> None:
    moe = ContextualMoE(FFNS["one bias"](), embed_dim=D, text_dim=8, num_experts=3).double()
    x, text = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    results = []
    for choice in ("eager", "triton"):
        moe.set_kernels(choice)
        moe.zero_grad()
        output = moe(x, text)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in moe.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def main(names: list[str]) -> None:
    """Run these forms, all by default, with blocks smaller than the FFN's width; then the rest."""
    kernels._BLOCK = 4
    for name in names or KNOWN:
        for keep in (True, False):
            values_and_gradients(name, keep=keep)
    unknown_activations_run_eagerly()
    frozen_inputs_no_tokens_and_second_derivatives()
    half_precision_is_rounded_once()
    a_block_with_a_context()
    print(f"{len(names or KNOWN)} forms")


if __name__ == "__main__":
    main(sys.argv[1:])
