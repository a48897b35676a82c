"""What covft knows of a ViT: plain data, found without running the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One transformer block.

    Attributes:
        index: Index of the block, from 0.
        path: Dotted path of the block in the ViT, such as `blocks.3`.
        mlp: Attribute of the block that holds its FFN, such as `mlp`.
        mlp_class: Class name of the FFN.
        embed_dim: Width D of the tokens that the FFN gets and returns.
        ffn_dim: Inner width F of the FFN.
        ffn_parameters: Number of parameters of the FFN.
        norms: Dotted paths, within the block, of the norms outside the FFN that have affine weights.
    """

    index: int
    path: str
    mlp: str
    mlp_class: str
    embed_dim: int
    ffn_dim: int
    ffn_parameters: int
    norms: tuple[str, ...]

    @property
    def mlp_path(self) -> str:
        """Dotted path of the FFN in the ViT, such as `blocks.3.mlp`."""
        return f"{self.path}.{self.mlp}"


@dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """What `wrap` sees of a ViT.

    Attributes:
        library: Where the model comes from: `timm`, `open_clip`, `transformers`, or a third party's name.
        class_name: Class of the model.
        blocks: Its transformer blocks, in the order in which they run.
        layout: Shape of the tokens at the FFNs. `"BND"`: (images, tokens, width). `"TD"`: (tokens, width), those of
            all images one after another; `"1TD"`: the same below an axis of one.
        num_prefix_tokens: Tokens before the patches (class token, registers); None if unknown.
        mask_argument: Argument of the model that marks real tokens, shape `(B, N)`; None if there is none.
        mask_unit: Where an entry of that mask stands for a tile: how many of its tokens are real, those behind them
            being padding. None where it stands for a token.
        image_axes: How many leading axes of the model's input count images; one text belongs to each.
        sizes_argument: Argument of a packed model (`"TD"`, `"1TD"`) that has the sides of each image, shape
            `(images, sides)`; None for others. An image has as many tokens as its sides, multiplied.
        sizes_unit: The length of a side that makes one token.
        image_size: Height (= width) of the images in pixels; None if it may vary or is unknown.
        num_tokens: Tokens per image at that size, prefix included; None if unknown.
    """

    library: str
    class_name: str
    blocks: tuple[BlockSpec, ...]
    layout: str = "BND"
    num_prefix_tokens: int | None = None
    mask_argument: str | None = None
    mask_unit: int | None = None
    image_axes: int = 1
    sizes_argument: str | None = None
    sizes_unit: int = 1
    image_size: int | None = None
    num_tokens: int | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def is_packed(self) -> bool:
        """Whether the FFNs see all images of a batch as one sequence of tokens."""
        return self.sizes_argument is not None

    @property
    def default_layers(self) -> tuple[int, ...]:
        """The latter half without the last block, which many MLLMs never read.

        A ViT of one block has no other choice than that block.
        """
        return tuple(range(max(self.depth // 2 - 1, 0), max(self.depth - 1, 1)))

    def __str__(self) -> str:
        return f"{self.library} {self.class_name}, {self.depth} blocks"


class Adapter(Protocol):
    """How one kind of ViT is built. Implement it for a model that covft does not know.

    Most models need no code: a `ViTFamily` describes them with data.
    """

    @property
    def name(self) -> str:
        """Name of the adapter; unique in the registry."""
        ...

    def matches(self, vit: nn.Module) -> bool:
        """Whether this adapter knows the model; must not import the model's library."""
        ...

    def describe(self, vit: nn.Module) -> ViTSpec:
        """Find blocks, FFNs and norms; must not run or change the model."""
        ...


def class_names(module: nn.Module) -> Iterator[str]:
    """Qualified names of a module's class and its bases, such as `timm.models.eva.Eva`."""
    for cls in type(module).__mro__:
        yield f"{cls.__module__}.{cls.__qualname__}"
