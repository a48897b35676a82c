"""A public fake: a small ViT in pure torch, for tests and examples that should need no other library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from covft.adapters.families import ViTFamily


class ToyBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, D)` in and out."""
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ToyViT(nn.Module):
    """Patches, a class token, blocks, a norm; random weights.

    Args:
        width: Width D of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads; must divide `width`.
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch in pixels.

    Example:
        >>> ToyViT()(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self, width: int = 16, depth: int = 4, num_heads: int = 4, image_size: int = 16, patch_size: int = 8
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(ToyBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` to tokens `(B, 1 + N, D)`."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


TOY_FAMILY = ViTFamily(
    name="covft/toy",
    classes=(f"{ToyViT.__module__}.{ToyViT.__qualname__}",),
    library="covft",
    blocks="blocks",
    mlp="mlp",
    prefix_tokens=(1,),
)
