"""What covft knows of a ViT: plain data, found without running the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One transformer block and its FFN.

    A block with several FFNs (two side by side, one before and one after the attention, one for the pixels of a patch
    and one for patches) has as many specs, with the same path and with indices of their own.

    Attributes:
        index: Index of the block, from 0.
        path: Dotted path of the block in the ViT, such as `blocks.3`.
        mlp: Attribute of the block that holds its FFN, such as `mlp`; dotted where it is further down.
        mlp_class: Class name of the FFN.
        embed_dim: Width D of the tokens that the FFN gets and returns.
        ffn_dim: Inner width F of the FFN.
        ffn_parameters: Number of parameters of the FFN.
        norms: Dotted paths, within the block, of the norms outside its FFNs that have affine weights.
        layout: How tokens lie in what the FFN gets. `"BND"`: (images, tokens, width), with any number of axes between
            images and width, such as (images, height, width, width). `"BCHW"`: channels second, as convolutions want
            them. `"(BF)ND"`, `"(BF)CHW"`: each image is several rows, one after another: patches of which the FFN
            sees the pixels, windows, pixel positions. `"TD"`, `"1TD"`: packed, see `ViTSpec`.
        output: Attribute of the block that holds the second half of an FFN that comes in two, `mlp` being the first;
            None where the FFN is one module.
        adds_residual: Whether that second half is also given the block's residual, and adds it.
        aliases: Other dotted paths in the ViT of the same FFN module, where it is used in several places.
    """

    index: int
    path: str
    mlp: str
    mlp_class: str
    embed_dim: int
    ffn_dim: int
    ffn_parameters: int
    norms: tuple[str, ...]
    layout: str = "BND"
    output: str | None = None
    adds_residual: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def mlp_path(self) -> str:
        """Dotted path of the FFN in the ViT, such as `blocks.3.mlp`."""
        return f"{self.path}.{self.mlp}"

    @property
    def output_path(self) -> str | None:
        """Dotted path in the ViT of the second half of an FFN that comes in two; None for others."""
        return None if self.output is None else f"{self.path}.{self.output}"


@dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """What `wrap` sees of a ViT.

    An index, as in `layers=`, counts FFNs in the order in which they run. In a plain ViT that is the number of the
    block. Stages follow one another, whatever their widths; branches that run side by side are counted branch by branch
    within each step; blocks at the end that see the class token alone are counted like all others; a block with two
    FFNs has two indices; an FFN that is used in several places has one.

    Attributes:
        library: Where the model comes from: `timm`, `open_clip`, `transformers`, or a third party's name.
        class_name: Class of the model.
        blocks: Its transformer blocks, one entry per FFN, in the order in which they run.
        layout: Shape of the tokens at the FFNs. `"BND"`: there is an axis for images; each block's own layout says
            where. `"TD"`: (tokens, width), those of
            all images one after another; `"1TD"`: the same below an axis of one.
        num_prefix_tokens: Tokens before the patches (class token, registers); None if unknown.
        mask_argument: Argument of the model that marks real tokens, shape `(B, N)`; None if there is none.
        mask_unit: Where an entry of that mask stands for a tile: how many of its tokens are real, those behind them
            being padding. None where it stands for a token.
        mask_padding: Where that argument tells several numbers of each token (its row and column) rather than whether
            it is real: what all of them are for padding. None for a mask.
        image_axes: How many leading axes of the model's input count images; one text belongs to each.
        sizes_argument: Argument of a packed model (`"TD"`, `"1TD"`) that has the sides of each image, shape
            `(images, sides)`; None for others. An image has as many tokens as its sides, multiplied,
            and its prefix tokens.
        sizes_unit: The length of a side that makes one token.
        sizes_square: Where sides count squares of tokens: how many tokens such a square is high and wide.
        merges: Whether tokens of a packed model are merged on the way, equally many into one.
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
    mask_padding: int | None = None
    image_axes: int = 1
    sizes_argument: str | None = None
    sizes_unit: int = 1
    sizes_square: int = 1
    merges: bool = False
    image_size: int | None = None
    num_tokens: int | None = None

    @property
    def depth(self) -> int:
        """Number of FFNs, which is that of the blocks where each has one."""
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
