"""What covft knows of a ViT: plain data, found without running the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from covft.adapters.input_format import InputFormat


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
            them. `"(BP)ND"`, `"(BP)CHW"`: each image is several rows, one after another: patches of which the FFN
            sees the pixels, windows, pixel positions. `"TD"`, `"1TD"`: packed, see `InputFormat`.
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
        input: How images reach the model.
        image_size: Height (= width) of the images in pixels; None if it may vary or is unknown.
        num_tokens: Tokens per image at that size, prefix included; None if unknown.
    """

    library: str
    class_name: str
    blocks: tuple[BlockSpec, ...]
    input: InputFormat = field(default_factory=InputFormat)
    image_size: int | None = None
    num_tokens: int | None = None

    @property
    def depth(self) -> int:
        """Number of FFNs, which is that of the blocks where each has one."""
        return len(self.blocks)

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
