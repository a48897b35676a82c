"""Equations (7) to (10) of the CoVFT paper, written out one image, one head and one expert at a time.

Only the parameters are shared with `covft.nn`: the norms and activations are formulas, the
attention is torch's own `nn.MultiheadAttention` over explicit keys and values, one per token, and the
parameters that `covft` leaves out because they cancel are filled with random numbers.
"""

import math

import torch
from torch import nn


def gelu(v):
    return v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))


def quick_gelu(v):
    return v / (1 + torch.exp(-1.702 * v))


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


def linear(v, weight, bias):
    return v @ weight.T + bias


def layer_norm(v, weight, bias, eps=1e-5):
    centred = v - v.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def refined(v, block, activation):
    """LN(r(v)): eq. 7, and the norm of eq. 8."""
    inner = ACTIVATIONS[activation](linear(v, block.up.weight, block.up.bias))
    residual = v + linear(inner, block.down.weight, block.down.bias)
    return layer_norm(residual, block.norm.weight, block.norm.bias)


def multihead_attention_state(attention):
    """The parameters of `nn.MultiheadAttention(C, H, kdim=D+C, vdim=D+C)`; the dead ones are random."""
    width = attention.q_proj.in_features
    dead_columns = torch.randn(width, width, dtype=attention.k_proj_weight.dtype)
    dead_bias = torch.randn(width, dtype=attention.k_proj_weight.dtype)
    return {
        "q_proj_weight": attention.q_proj.weight,
        "k_proj_weight": torch.cat([attention.k_proj_weight, dead_columns], dim=1),
        "v_proj_weight": torch.cat([attention.v_proj_image_weight, attention.v_proj_text.weight], dim=1),
        "in_proj_bias": torch.cat([attention.q_proj.bias, dead_bias, attention.v_proj_text.bias]),
        "out_proj.weight": attention.out_proj.weight,
        "out_proj.bias": attention.out_proj.bias,
    }


def attended(image, text, num_heads, state):
    """Eq. 8 for one image: tokens `(N, D)` and text `(C,)`, both refined; returns `(C,)`."""
    width, joint = len(text), image.shape[1] + len(text)
    module = nn.MultiheadAttention(width, num_heads, kdim=joint, vdim=joint, batch_first=True, dtype=image.dtype)
    keys = torch.stack([torch.cat([token, text]) for token in image])[None]
    output, _ = torch.func.functional_call(module, state, (text[None, None], keys, keys))
    return output[0, 0]


def context_vector(kind, context, tokens, text, num_heads, activation):
    """The context of one image, for each variant of the paper."""
    image = refined(tokens, context.image, activation).mean(0) if kind in ("image", "concat") else None
    words = refined(text, context.text, activation) if kind != "image" else None
    if kind == "image":
        return image
    if kind == "text":
        return words
    if kind == "concat":
        return torch.cat([image, words])
    state = multihead_attention_state(context.attention)
    return attended(refined(tokens, context.image, activation), words, num_heads, state)


def routing_weights(vector, gate, top_k=None):
    """Eq. 9 for one image; `top_k` keeps the largest and scales them to sum to 1."""
    exponentials = torch.exp(linear(vector, gate.weight, gate.bias))
    weights = exponentials / exponentials.sum()
    if top_k is None:
        return weights
    plain = weights.tolist()
    chosen = sorted(range(len(plain)), key=lambda e: -plain[e])[:top_k]
    total = sum(weights[e] for e in chosen)
    return torch.stack([weights[e] / total if e in chosen else weights[e] * 0 for e in range(len(weights))])


def expert(tokens, ffn):
    """A two-layer FFN: `nn.Sequential(nn.Linear, nn.GELU, nn.Linear)`."""
    inner = gelu(linear(tokens, ffn[0].weight, ffn[0].bias))
    return linear(inner, ffn[2].weight, ffn[2].bias)


def mixed(tokens, experts, weights):
    """Eq. 10 for one image."""
    return sum(weight * expert(tokens, ffn) for weight, ffn in zip(weights, experts, strict=True))
