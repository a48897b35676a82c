"""The table that every tuning method is tested on: one tower per family, and what each method promises there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from covft.adapters.registry import describe
from covft.tuning import tune
from tests.helpers.towers import BY_NAME, DEPTH, SIZE, TEXT_DIM, WIDTH, Tower, features

FAMILIES = ("timm-clip", "open_clip-native", "hf-clip", "hf-siglip", "hf-dinov3", "hf-internvl", "hf-qwen2.5-vl")
# Those on which every method is tried in each run of the tests; CI tries them on all.
OFTEN = ("timm-clip", "hf-clip", "hf-qwen2.5-vl")
# Options that keep what is built small; those of other methods are their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "last_layers": {"n": 2},
    "lora": {"r": 2},
    "dora": {"r": 2},
    "vpt": {"prompts": 3},
    "svpt": {"prompts": 3},
    "qa_vit": {"width": 8},
    "adaln": {"width": 8},
    "cross_attention": {"heads": 2},
}
# Why a method cannot be used on a tower, as its error says.
REFUSED = {
    ("dora", "open_clip-native"): "peft cannot adapt",
    ("vpt", "hf-dinov3"): "has positions",
    ("vpt", "hf-qwen2.5-vl"): "as one sequence",
    ("svpt", "hf-dinov3"): "has positions",
    ("svpt", "hf-qwen2.5-vl"): "as one sequence",
    ("qa_vit", "hf-dinov3"): "has positions",
    ("qa_vit", "hf-qwen2.5-vl"): "as one sequence",
    **{("q_moe", name): "connector of a multimodal LLM" for name in FAMILIES},
}
# Methods that mix equal experts at the start, whose output is the plain one up to rounding.
MIXES = ("q_moe",)
# Methods whose output differs from the plain tower's before training.
CHANGED_AT_START = ("vpt", "svpt")
READS_TEXT = ("qa_vit", "adaln", "cross_attention", "q_moe")
READS_STATES = ("qa_vit", "cross_attention")


def cases(methods: list[str]) -> list[Any]:
    """Every method on every family that takes it, so those alone that a ViT can have without a language model."""
    return [
        pytest.param(method, name, marks=() if name in OFTEN else pytest.mark.long)
        for name in FAMILIES
        for method in methods
        if (method, name) not in REFUSED
    ]


def taken_by(name: str, methods: Iterable[str]) -> list[str]:
    """Those of the methods that a family takes."""
    return [method for method in methods if (method, name) not in REFUSED]


def tower_of(name: str) -> tuple[Tower, nn.Module]:
    """Return an entry of the table of towers, and the ViT, in eval mode with dropout-free weights that differ."""
    tower = BY_NAME[name]
    torch.manual_seed(0)
    vit = tower.build().eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return tower, vit


def tuned_of(method: str, vit: nn.Module) -> Any:
    """Tune a ViT of the table, with text features and images of its type."""
    images = torch.randn(4, 3, SIZE, SIZE, dtype=next(vit.parameters()).dtype)
    return tune(vit, method, text_encoder=TEXT_DIM, images=images, **OPTIONS.get(method, {}))


def answer(model: nn.Module, tower: Tower, images: Tensor, text: Tensor | None = None) -> Tensor:
    """Return the features of a call, with the text if there is one."""
    given = () if text is None else (text,)
    return features(model(images, *given, **tower.inputs(3)))


def texts(method: str) -> Tensor:
    """Return features of three texts, or states of five tokens each where the method reads those."""
    shape = (3, 5, TEXT_DIM) if method in READS_STATES else (3, TEXT_DIM)
    return torch.randn(shape, dtype=torch.float64)


def expected_parameters(method: str, vit: nn.Module) -> int:
    """Return how many parameters a method trains, by its formula from the sizes of the ViT alone."""
    d, c = WIDTH, TEXT_DIM
    spec = describe(vit)
    adapted = range(DEPTH // 2 - 1, DEPTH - 1)
    blocks = [vit.get_submodule(path) for path in dict.fromkeys(block.path for block in spec.blocks)]
    everything = dict(vit.named_parameters())
    size = {name: parameter.numel() for name, parameter in everything.items()}
    if method == "frozen":
        return 0
    if method == "full":
        return sum(size.values())
    if method == "bitfit":
        return sum(number for name, number in size.items() if name.endswith("bias"))
    if method == "layernorm":
        norms = [m for m in vit.modules() if "norm" in type(m).__name__.lower()]
        return sum(p.numel() for norm in norms for p in norm.parameters(recurse=False))
    if method == "ffn":
        return sum(spec.blocks[layer].ffn_parameters for layer in adapted)
    if method in ("last_layers", "top_layer"):
        n = 2 if method == "last_layers" else 1
        return sum(p.numel() for block in blocks[-n:] for p in block.parameters())
    if method in ("lora", "dora"):
        total = 0
        for block in blocks:
            for module in block.modules():
                if isinstance(module, nn.MultiheadAttention):
                    total += 2 * (d + 3 * d)  # the joint projection alone
            attentions = [m for m in block.modules() if isinstance(m, nn.MultiheadAttention)]
            inside = {id(m) for attention in attentions for m in attention.modules()}
            for module in block.modules():
                if isinstance(module, nn.Linear) and id(module) not in inside:
                    total += 2 * (module.in_features + module.out_features)
                    total += module.out_features if method == "dora" else 0
        return total
    if method in ("vpt", "svpt"):
        return DEPTH * 3 * d
    if method == "qa_vit":
        return len(adapted) * (c * 8 + 8 + 8 * d + d + 1)
    if method == "adaln":
        return len(adapted) * (c * 8 + 8 + 2 * (8 * 2 * d + 2 * d))
    assert method == "cross_attention"
    return len(adapted) * (2 * d + 2 * c + (d * c + c) + (c * 2 * c + 2 * c) + (c * d + d) + 1)
