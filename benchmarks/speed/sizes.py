"""Sizes of the measured models: CLIP-L/14-336 as LLaVA-1.5 reads it, and toys of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Record = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of a tower.

    Attributes:
        embed_dim: Width D of the tokens.
        ffn_dim: Inner width F of the FFN.
        depth: Number of blocks.
        num_heads: Heads of the self-attention.
        image_size: Side of an image, pixels.
        patch_size: Side of a patch, pixels.
        text_dim: Width C of the text features.
        layers: Adapted blocks.
    """

    embed_dim: int = 1024
    ffn_dim: int = 4096
    depth: int = 24
    num_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    text_dim: int = 768
    layers: tuple[int, ...] = tuple(range(11, 23))

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


CLIP_L = Size()
TINY = Size(32, 64, 4, 4, 32, 8, 16, (1, 2))


def clip(size: Size) -> Any:
    """Build Hugging Face's CLIP tower with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=size.embed_dim, intermediate_size=size.ffn_dim, num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads, image_size=size.image_size, patch_size=size.patch_size,
    )  # fmt: skip
    return CLIPVisionModel(config)


def clip_ffn(size: Size) -> nn.Module:
    """Build one FFN of that tower."""
    return clip(Size(**{**size.__dict__, "depth": 1})).encoder.layers[0].mlp
