"""Small encoders to save and load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import covft
from tests.helpers.towers import features, perturb

WIDTH = 8  # of the text features


def timm_vit() -> Any:
    return pytest.importorskip("timm").create_model("test_vit", img_size=32, num_classes=5)


def clip_vit(**overrides: int) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**{**sizes, "image_size": 32, "patch_size": 8, **overrides})
    return transformers.CLIPVisionModel(config)


TOWERS = {"timm": timm_vit, "clip": clip_vit}


class Words(nn.Module):
    """A text encoder with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)

    def forward(self, texts: list[str]) -> Tensor:
        return torch.stack([self.table(torch.tensor(list(t.encode()))).mean(0) for t in texts])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Three images and the features of their texts."""
    return torch.randn(3, 3, 32, 32, dtype=dtype), torch.randn(3, WIDTH, dtype=dtype)


def wrapped(vit: nn.Module, **settings: Any) -> covft.ContextEncoder:
    return covft.wrap(vit, WIDTH, **{"layers": (1, 2), "experts": 2, **settings})


def trained(encoder: covft.ContextEncoder, steps: int = 3) -> covft.ContextEncoder:
    optimizer = torch.optim.AdamW(encoder.param_groups(lr=0.02))
    perturb(encoder)
    for _ in range(steps):
        images, text = inputs()
        features(encoder(images, text)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder
