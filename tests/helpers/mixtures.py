"""Mixtures with random parameters for hypothesis, and the paper's equations for them, one image at a time."""

import torch
from hypothesis import strategies as st
from torch import nn

from covft.nn import ContextualMoE
from tests.helpers import oracle

CONTEXTS = ("cve", "image", "text", "concat")
VARIANTS = [(c, r) for r in ("dense", "sparse") for c in CONTEXTS] + [("cve", "uniform"), ("cve", "random")]

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@st.composite
def shapes(draw):
    heads, experts = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 5))
    return {
        "B": draw(st.integers(1, 3)),
        "N": draw(st.integers(1, 6)),
        "D": draw(st.integers(2, 7)),
        "C": heads * draw(st.integers(2, 3)),
        "F": draw(st.integers(1, 9)),
        "E": experts,
        "K": draw(st.integers(1, experts)),
        "H": heads,
        "seed": draw(st.integers(0, 2**31)),
    }


def feed_forward(embed_dim, ffn_dim, dtype=torch.float64):
    return nn.Sequential(
        nn.Linear(embed_dim, ffn_dim, dtype=dtype), nn.GELU(), nn.Linear(ffn_dim, embed_dim, dtype=dtype)
    )


def random_moe(shape, context="cve", routing="dense", activation="gelu"):
    """A mixture whose parameters are all random: different experts, biases and norms off their initial values."""
    moe = ContextualMoE(
        feed_forward(shape["D"], shape["F"]),
        embed_dim=shape["D"],
        text_dim=shape["C"],
        num_experts=shape["E"],
        routing=routing,
        top_k=shape["K"],
        context=context,
        activation=activation,
        num_heads=shape["H"],
    )
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return moe


def random_inputs(shape):
    x = torch.randn(shape["B"], shape["N"], shape["D"], dtype=torch.float64, requires_grad=True)
    text = torch.randn(shape["B"], shape["C"], dtype=torch.float64, requires_grad=True)
    return x, text


def naive(moe, x, text, shape, context, routing, activation="gelu", expert_ids=None, lengths=None):
    """Outputs, one image at a time; also the least gap between a chosen and a passed-over expert."""
    outputs, gap = [], float("inf")
    for b in range(shape["B"]):
        tokens = x[b] if lengths is None else x[b, : lengths[b]]
        if routing in ("dense", "sparse"):
            vector = oracle.context_vector(context, moe.context, tokens, text[b], shape["H"], activation)
            weights = oracle.routing_weights(vector, moe.router.gate)
            ordered = weights.detach().sort(descending=True).values
            if routing == "sparse":
                weights = oracle.routing_weights(vector, moe.router.gate, shape["K"])
                if shape["K"] < shape["E"]:
                    gap = min(gap, float(ordered[shape["K"] - 1] - ordered[shape["K"]]))
        elif routing == "uniform":
            weights = [1 / shape["E"]] * shape["E"]
        else:
            weights = [(e in expert_ids[b].tolist()) / shape["K"] for e in range(shape["E"])]
        outputs.append(oracle.mixed(tokens, moe.experts, weights))
    return outputs, gap


def gradients(scalar, moe, *inputs):
    """Gradients of every parameter and input; zeros where a path does not exist."""
    wanted = [*moe.parameters(), *inputs]
    found = torch.autograd.grad(scalar, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def assert_same_gradients(moe, ours, theirs, *, inputs=("x", "text")):
    names = [name for name, _ in moe.named_parameters()] + list(inputs)
    for name, mine, other in zip(names, ours, theirs, strict=True):
        scale = max(1.0, float(other.abs().max()) if other.numel() else 1.0)
        torch.testing.assert_close(mine / scale, other / scale, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
