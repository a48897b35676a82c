"""Memory of a step: what the equations of `docs/guides/cheaper.md` give, and what the allocator counts."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from benchmarks.speed.measure import bytes_for_backward
from covft.nn import ContextualMoE

B, C, E = 4, 768, 4
SETTINGS = ["none", "activation", pytest.param("all", marks=pytest.mark.quick)]


def block(device, recompute):
    """The slot of one block, its tokens and its text; of CLIP-L's size on a GPU."""
    tokens, width = (577, 1024) if device.type == "cuda" else (257, 256)
    ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(device, torch.bfloat16)
    moe = ContextualMoE(ffn, embed_dim=width, text_dim=C, num_experts=E, recompute=recompute)
    x = torch.randn(B, tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    return moe, x, torch.randn(B, C, device=device, dtype=torch.bfloat16)


def kept_by(recompute, tokens, width):
    """Bytes that are kept for backward in addition to the tokens, bfloat16.

    In every setting: the refined tokens before and after their norm. Then, of each expert, pre-activation, activation
    and output, and of the refinement the first two; or the pre-activations alone; or nothing.
    """
    inner = {"none": E * (4 + 4 + 1) + 2 + 2, "activation": E * 4 + 2, "all": 0}[recompute]
    return 2 * B * tokens * width * (2 + inner)


@pytest.mark.parametrize("recompute", SETTINGS)
def test_forward__keeps_what_the_arithmetic_says(recompute, device):
    moe, x, text = block(device, recompute)
    wanted = kept_by(recompute, *x.shape[1:])
    if device.type == "cuda":
        moe(x, text).sum().backward()  # the first product takes cuBLAS its workspace
        moe.zero_grad()
        x.grad = None
        before = torch.cuda.memory_allocated(device)
        output = moe(x, text)
        found = torch.cuda.memory_allocated(device) - before - output.nbytes
    else:
        found = bytes_for_backward(lambda: moe(x, text), [x, *moe.parameters()])
    # Vectors of one entry per token, and of one per image, are left out of the arithmetic.
    assert wanted <= found < 1.03 * wanted + 2**20


@pytest.mark.parametrize("recompute", ["none", "activation", "all"])
def test_step__peaks_where_the_arithmetic_says(recompute, device):
    if device.type != "cuda":
        pytest.skip("a CPU has no allocator that counts")
    moe, x, text = block(device, recompute)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-5)
    sizes = sum(p.nbytes for p in moe.parameters())
    tokens, width = x.shape[1:]
    wide = 2 * B * tokens * 4 * width  # one tensor of the FFN's inner width
    gc.collect()  # what earlier tests left in cycles
    moe(x, text).sum().backward()  # the first product takes cuBLAS its workspace
    moe.zero_grad()
    x.grad = None
    start = torch.cuda.memory_allocated(device)
    for _ in range(2):
        moe(x, text).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
    gc.collect()
    held = torch.cuda.memory_allocated(device) - start
    assert 2 * sizes <= held < 2.05 * sizes + 2**20  # two moments; and the steps' numbers
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    moe(x, text).sum().backward()
    peak = torch.cuda.max_memory_allocated(device) - before
    at_least = kept_by(recompute, tokens, width)
    # Gradients of the weights, and of one expert at a time: its inner tensors and their gradients, the tokens'.
    assert at_least < peak < at_least + sizes + 6 * wide + 8 * wide / 4


def test_layers_of_a_tower__keep_their_activations_as_a_cpu_counts_them(device):
    """What autograd keeps of the complete tower is the same on both devices, up to the attention's own choice."""
    import transformers

    import covft

    if device.type != "cuda":
        pytest.skip("compares a GPU with the CPU")
    config = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    counted = []
    for where in ("cpu", device):
        encoder = covft.wrap(transformers.CLIPVisionModel(config).to(where, torch.bfloat16), C, layers=[1, 2]).train()
        images = torch.randn(2, 3, 336, 336, device=where, dtype=torch.bfloat16)
        text = torch.randn(2, C, device=where, dtype=torch.bfloat16)
        counted.append(bytes_for_backward(lambda e=encoder, i=images, t=text: e(i, t), encoder.parameters()))
    assert counted[1] == pytest.approx(counted[0], rel=0.1)
