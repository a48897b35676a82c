"""Weights of several floating-point types, and text features beyond the range of float16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from covft.nn.functional import in_type_of
from covft.nn.moe import ContextualMoE

CONTEXTS = ["cve", "text", "concat"]


def mixture(**settings: Any) -> ContextualMoE:
    ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    moe = ContextualMoE(ffn, embed_dim=8, text_dim=4, num_experts=3, **settings)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return moe


# Casts of a part, by path; the type of the tokens
CASTS: dict[str, tuple[dict[str, torch.dtype], torch.dtype]] = {
    "router": ({"router": torch.float32}, torch.bfloat16),
    "context": ({"context": torch.float32}, torch.bfloat16),
    "experts": ({"experts": torch.float32}, torch.bfloat16),
    "norms": ({"context.image.norm": torch.float32, "context.text.norm": torch.float32}, torch.bfloat16),
    "low context": ({"": torch.float32, "context": torch.bfloat16}, torch.float32),
    "low experts": ({"": torch.float32, "experts": torch.bfloat16}, torch.float32),
    "half layer": ({"": torch.float32, "context.image.down": torch.bfloat16}, torch.float32),
    "projection": (
        {"context.attention.q_proj": torch.float32, "context.attention.out_proj": torch.float32},
        torch.half,
    ),
}


@pytest.mark.parametrize("recompute", ["none", "activation", "all"])
@pytest.mark.parametrize("name", CASTS)
def test_parts_of_another_type__give_the_outputs_of_one_type(name, recompute):
    moe = mixture(recompute=recompute)
    x, text = torch.randn(2, 5, 8), torch.randn(2, 4)
    wanted = moe(x, text)
    casts, dtype = CASTS[name]
    mixed = copy.deepcopy(moe).to(dtype)
    for path, other in casts.items():
        mixed.get_submodule(path).to(other)
    output = mixed(x.to(dtype).requires_grad_(), text)
    assert output.dtype == dtype
    assert torch.allclose(output.float(), wanted, atol=0.1)
    output.float().square().sum().backward()
    for parameter in mixed.parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all()


def test_in_type_of__leaves_autocast_and_packed_weights_alone():
    x = torch.randn(2, 3)
    assert in_type_of(x, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for other in (torch.zeros(1, dtype=torch.uint8), None, lambda: None, torch.zeros(1)):
        assert in_type_of(x, other) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert in_type_of(x, torch.zeros(1, dtype=torch.bfloat16)) is x


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e15])
@pytest.mark.parametrize("context", CONTEXTS)
def test_float16__takes_features_of_any_size(context, size):
    moe = mixture(context=context)
    x, text = torch.randn(2, 5, 8), size * torch.randn(2, 4)
    wanted = moe.double().route(x.double(), text.double())[0].weights_BE
    half = moe.half()
    routing, _ = half.route(x.half(), text)
    assert torch.allclose(routing.weights_BE.double(), wanted, atol=0.02)
    half(x.half(), text).float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.parametrize("context", CONTEXTS)
def test_float16_autocast__takes_features_of_any_size(context):
    moe = mixture(context=context)
    x, text = torch.randn(2, 5, 8), 1e6 * torch.randn(2, 4)
    wanted = moe.route(x, text)[0].weights_BE
    with torch.autocast("cpu", torch.float16):
        assert torch.allclose(moe.route(x, text)[0].weights_BE, wanted, atol=0.02)
        output = moe(x, text)
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())
