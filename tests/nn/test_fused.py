"""The fused mixture: the same numbers as experts run one by one, with less kept for backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from covft.nn import fused
from covft.nn.fused import mix
from covft.nn.plan import FFNPlan
from tests.helpers.ffns import FFNS, D, E, Gated, experts_like, one_by_one


@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, D), (3, D), (2, 2, 3, D)], ids=str)
@pytest.mark.parametrize("name", FFNS)
def test_mix__values_and_all_gradients_are_those_of_the_experts(name, shape, keep, rows, monkeypatch):
    monkeypatch.setattr(fused, "_ROWS", rows)  # in blocks, the last one smaller, or at once
    ffn = FFNS[name]()
    plan, reason = FFNPlan.of(ffn)
    assert plan is not None, reason
    experts = experts_like(ffn)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(shape[0], E, dtype=torch.float64, requires_grad=True)
    inputs = [x, weights, *(p for expert in experts for p in expert.parameters())]
    wanted = one_by_one(x, weights, experts)
    found = mix(x, weights, experts, plan, keep_pre_activations=keep)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(wanted, inputs, upstream), torch.autograd.grad(found, inputs, upstream), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_mix__agrees_with_finite_differences(keep):
    ffn = Gated()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)[:2]
    parameters = [p for expert in experts for p in expert.parameters()]
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weights, *_):
        return mix(x, weights, experts, plan, keep_pre_activations=keep)

    assert torch.autograd.gradcheck(function, (x, weights, *parameters))


@pytest.mark.parametrize("frozen", ["x", "weights", "experts", "one expert", "biases"])
def test_mix__frozen_inputs_get_no_gradient(frozen, monkeypatch):
    monkeypatch.setattr(fused, "_ROWS", 3)
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=frozen != "x")
    weights = torch.rand(2, E, dtype=torch.float64, requires_grad=frozen != "weights")
    named = {f"{e}.{name}": p for e, expert in enumerate(experts) for name, p in expert.named_parameters()}
    for name, parameter in named.items():
        off = {"experts": True, "one expert": name.startswith("1."), "biases": name.endswith("bias")}
        parameter.requires_grad_(not off.get(frozen, False))
    one_by_one(x, weights, experts).square().sum().backward()
    wanted = {name: p.grad for name, p in {**named, "x": x, "weights": weights}.items()}
    for tensor in (x, weights, *named.values()):
        tensor.grad = None
    mix(x, weights, experts, plan, keep_pre_activations=True).square().sum().backward()
    for name, tensor in {**named, "x": x, "weights": weights}.items():
        assert (tensor.grad is None) == (wanted[name] is None), name
        assert tensor.grad is None or torch.allclose(tensor.grad, wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_mix__runs_without_any_image(keep):
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x = torch.zeros(0, 4, D, dtype=torch.float64, requires_grad=True)
    output = mix(x, torch.zeros(0, E, dtype=torch.float64), experts, plan, keep_pre_activations=keep)
    assert output.shape == (0, 4, D)
    output.sum().backward()
    for expert in experts:
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in expert.parameters())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["mlp", "gate first", "one bias"])
def test_mix__computes_in_the_type_of_autocast(name, keep, monkeypatch):
    monkeypatch.setattr(fused, "_ROWS", 4)
    ffn = FFNS[name]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn, torch.float32)
    x = torch.randn(2, 5, D, requires_grad=True)
    weights = torch.rand(2, E, requires_grad=True)
    inputs = [x, weights, *(p for expert in experts for p in expert.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = one_by_one(x, weights, experts)
        found = mix(x, weights, experts, plan, keep_pre_activations=keep)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2 * wanted.abs().max().item())
    exact = torch.autograd.grad(one_by_one(x, weights, experts).sum(), inputs)
    rounded = torch.autograd.grad(wanted.sum(), inputs)
    ours = torch.autograd.grad(found.sum(), inputs)
    for one, other, tensor, plain in zip(ours, exact, inputs, rounded, strict=True):
        assert one.dtype == tensor.dtype
        scale = other.abs().max().item() + 1e-6
        # No further from the exact gradient than autocast itself is, within a few roundings.
        assert (one - other).abs().max() <= (plain - other).abs().max() + 0.03 * scale


def test_mix__keeps_the_tokens_and_if_asked_the_pre_activations():
    ffn = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    plan, _ = FFNPlan.of(ffn)
    experts = [copy.deepcopy(ffn) for _ in range(E)]
    own = {p.untyped_storage().data_ptr() for expert in experts for p in expert.parameters()}
    x, weights = torch.randn(2, 50, 32, requires_grad=True), torch.rand(2, E, requires_grad=True)

    def kept(function):
        seen = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = function()
        del output
        return sum(seen.values())

    tokens, routing = x.numel() * 4, weights.numel() * 4
    assert kept(lambda: mix(x, weights, experts, plan, keep_pre_activations=False)) == tokens + routing
    wide = tokens + routing + E * 2 * 50 * 128 * 4
    assert kept(lambda: mix(x, weights, experts, plan, keep_pre_activations=True)) == wide
    assert kept(lambda: one_by_one(x, weights, experts)) > 1.8 * wide


@pytest.mark.long
@pytest.mark.parametrize("name", ["mlp", "gate last"])
def test_mix__can_be_differentiated_twice(name):
    ffn = FFNS[name]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)[:2]
    parameters = [p for expert in experts for p in expert.parameters()]
    x = torch.randn(2, 2, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weights, *_):
        return mix(x, weights, experts, plan, keep_pre_activations=True)

    assert torch.autograd.gradgradcheck(function, (x, weights, *parameters))
    # A gradient penalty: the upstream gradient has no graph of its own.
    grown = []
    for run in (lambda: function(x, weights), lambda: one_by_one(x, weights, experts)):
        (gradient,) = torch.autograd.grad(run().sum(), x, create_graph=True)
        grown.append(torch.autograd.grad(gradient.square().sum(), [x, weights, *parameters], allow_unused=True))
    for one, other in zip(*grown, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        output = mix(x.detach().float().requires_grad_(), weights.detach().float(),
                     experts_like(ffn, torch.float32)[:2], plan, keep_pre_activations=True)  # fmt: skip
    with pytest.raises(NotImplementedError, match="recompute='none'"):
        output.sum().backward(create_graph=True)


def test_mix__refuses_weights_that_changed_since_forward():
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    output = mix(x, torch.rand(2, E, dtype=torch.float64), experts, plan, keep_pre_activations=True)
    with torch.no_grad():
        experts[0][0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_mix__keeps_nothing_where_nothing_is_differentiated():
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x, weights = torch.randn(2, 5, D, dtype=torch.float64), torch.rand(2, E, dtype=torch.float64)
    wanted = mix(x, weights, experts, plan, keep_pre_activations=True)
    with torch.no_grad():
        found = mix(x, weights, experts, plan, keep_pre_activations=True)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
