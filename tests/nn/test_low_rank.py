"""Low-rank experts: the numbers of full experts whose weights are W + B A."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.speed.measure import bytes_for_backward
from covft.errors import UnsupportedViTError
from covft.nn.low_rank import LowRankExperts
from covft.nn.router import Routing
from tests.helpers.ffns import FFNS, D, E, one_by_one

NAMES = ("mlp", "mlp without biases", "one bias", "gate first", "gate last", "halves last")


def written_out(experts):
    """Full FFNs with the weights that the low-rank experts represent."""
    full = []
    for expert in range(len(experts)):
        ffn = copy.deepcopy(experts.shared)
        with torch.no_grad():
            for name, difference in zip((*experts.plan.first, experts.plan.last), experts.differences, strict=True):
                layer = ffn.get_submodule(name)
                layer.weight += difference.up[expert] @ difference.down[expert]
                if layer.bias is not None:
                    layer.bias += difference.bias[expert]
        full.append(ffn)
    return full


def routing(images, dtype=torch.float64):
    return Routing(torch.rand(images, E, dtype=dtype).softmax(-1))


@pytest.mark.parametrize("shape", [(2, 5, D), (3, D), (2, 2, 3, D)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward__is_that_of_the_weights_written_out(name, shape):
    experts = LowRankExperts(FFNS[name](), E, rank=2).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x, decided = torch.randn(shape, dtype=torch.float64), routing(shape[0])
    wanted = one_by_one(x, decided.weights_BE, written_out(experts))
    assert torch.allclose(experts(x, decided), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_start__the_experts_are_the_ffn_and_only_the_differences_train(name):
    ffn = FFNS[name]().double()
    experts = LowRankExperts(ffn, E, rank=2)
    x, decided = torch.randn(2, 5, D, dtype=torch.float64), routing(2)
    output = experts(x, decided)
    assert torch.allclose(output, ffn(x), rtol=1e-10, atol=1e-12)
    output.square().sum().backward()
    for parameter_name, parameter in experts.named_parameters():
        assert parameter.requires_grad == (not parameter_name.startswith("shared."))
        assert (parameter.grad is None) == parameter_name.startswith("shared.")
    # Both factors learn: B at once, A as soon as B is no longer zero.
    with torch.no_grad():
        for difference in experts.differences:
            difference.up.normal_()
            difference.up.grad = difference.down.grad = None
    experts(x, decided).square().sum().backward()
    for difference in experts.differences:
        assert all(difference.down.grad[expert].abs().max() > 0 for expert in range(E))
        assert all(difference.up.grad[expert].abs().max() > 0 for expert in range(E))


@pytest.mark.parametrize("name", NAMES)
def test_of__full_rank_is_exact_and_a_lower_one_the_best_approximation(name):
    ffn = FFNS[name]()
    full = [copy.deepcopy(ffn).double() for _ in range(E)]
    for expert in full:
        for parameter in expert.parameters():
            nn.init.normal_(parameter)
    x, decided = torch.randn(2, 5, D, dtype=torch.float64), routing(2)
    wanted = one_by_one(x, decided.weights_BE, full)
    exact = LowRankExperts.of(full, rank=min(D, 10))
    assert torch.allclose(exact(x, decided), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    thin = LowRankExperts.of(full, rank=2)
    name_of = (*thin.plan.first, thin.plan.last)
    for layer, difference in zip(name_of, thin.differences, strict=True):
        theirs = torch.stack([expert.get_submodule(layer).weight for expert in full])
        for expert in range(E):
            left = theirs[expert] - theirs.mean(0) - difference.up[expert] @ difference.down[expert]
            values = torch.linalg.svdvals(theirs[expert] - theirs.mean(0))
            assert torch.linalg.matrix_norm(left).item() == pytest.approx(
                values[2:].square().sum().sqrt().item(), rel=1e-4
            )


def test_refused__another_form():
    ffn = nn.Sequential(nn.Linear(D, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, D))
    with pytest.raises(UnsupportedViTError, match="cannot be made from Sequential"):
        LowRankExperts(ffn, E, rank=2)


@pytest.mark.parametrize("name", NAMES)
def test_recompute__gradients_and_second_derivatives_are_those_without(name):
    experts = LowRankExperts(FFNS[name](), E, rank=2).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x, decided = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True), routing(2)
    decided.weights_BE.requires_grad_(True)
    wanted = [p for p in (x, decided.weights_BE, *experts.parameters()) if p.requires_grad]
    found = {}
    for recompute in ("none", "activation", "all"):
        experts.recompute = recompute
        output = experts(x, decided)
        first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), wanted)
        found[recompute] = (output, *first, *second)
    for recompute in ("activation", "all"):
        for one, other in zip(found[recompute], found["none"], strict=True):
            torch.testing.assert_close(one, other)


def test_recompute__uses_the_weights_of_the_call():
    """Weights that were lent for the forward are gone in backward."""
    experts = LowRankExperts(FFNS["mlp"](), E, rank=2).double()
    lent = {name: torch.randn_like(p, requires_grad=p.requires_grad) for name, p in experts.named_parameters()}
    trained = [tensor for tensor in lent.values() if tensor.requires_grad]
    x, decided, found = torch.randn(2, 5, D, dtype=torch.float64), routing(2), []
    for recompute in ("none", "all"):
        experts.recompute = recompute
        output = torch.func.functional_call(experts, lent, (x, decided))
        found.append(torch.autograd.grad(output.square().sum(), trained))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_recompute__keeps_the_tokens_and_the_shared_products():
    """Of eight experts whose inner width is four times the outer."""
    experts = LowRankExperts(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)), 8, rank=2)
    x, decided = torch.randn(3, 50, 32), Routing(torch.rand(3, 8).softmax(-1))
    tokens, sizes = x.numel() * 4, {}
    for recompute in ("none", "activation", "all"):
        experts.recompute = recompute
        sizes[recompute] = bytes_for_backward(lambda: experts(x, decided), experts.parameters())
    weights = 3 * 8 * 4
    assert sizes["all"] == tokens + weights
    assert sizes["activation"] == 5 * tokens + weights
    assert sizes["none"] > 8 * 8 * tokens
