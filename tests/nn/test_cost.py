"""Analytic counts against the modules themselves."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from covft.nn import ContextualMoE
from covft.nn.cost import count_flops, count_parameters

D, F, C, N, B = 24, 40, 8, 11, 3
VARIANTS = [
    ("dense", "cve"),
    ("dense", "image"),
    ("dense", "text"),
    ("dense", "concat"),
    ("sparse", "cve"),
    ("sparse", "concat"),
    ("uniform", "cve"),
    ("random", "cve"),
]


def build(routing, context, experts=5, top_k=2):
    ffn = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
    return ffn, ContextualMoE(
        ffn, embed_dim=D, text_dim=C, num_experts=experts, routing=routing, top_k=top_k, context=context
    )


@pytest.mark.parametrize(("routing", "context"), VARIANTS)
def test_parameters_are_those_of_the_modules(routing, context):
    ffn, moe = build(routing, context)
    counted = count_parameters(
        embed_dim=D,
        text_dim=C,
        ffn_parameters=sum(p.numel() for p in ffn.parameters()),
        num_experts=5,
        routing=routing,
        context=context,
    )
    assert counted.total == sum(p.numel() for p in moe.parameters())
    assert counted.experts == sum(p.numel() for p in moe.experts.parameters())
    assert counted.router == sum(p.numel() for p in moe.router.parameters())


@pytest.mark.parametrize(("routing", "context"), VARIANTS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_flops_are_those_that_the_modules_execute(routing, context, top_k):
    ffn, moe = build(routing, context, top_k=top_k)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe(torch.randn(B, N, D), torch.randn(B, C))
    counted = count_flops(
        embed_dim=D,
        text_dim=C,
        ffn_weights=sum(p.numel() for p in ffn.parameters() if p.dim() > 1),
        num_tokens=N,
        num_experts=5,
        routing=routing,
        top_k=top_k,
        context=context,
        num_heads=4,
    )
    assert B * counted.total == counter.get_total_flops()


def test_the_parts_of_a_block_of_clip_l_are_the_documented_ones():
    """The numbers that the documentation gives for CLIP-L/14, text width 768, 4 experts."""
    counted = count_parameters(embed_dim=1024, text_dim=768, ffn_parameters=8_393_728)
    assert (counted.experts, counted.image_refinement, counted.text_refinement) == (
        33_574_912,
        4_199_424,
        2_363_136,
    )
    assert (counted.attention, counted.router, counted.total) == (3_344_640, 3_076, 43_485_188)
