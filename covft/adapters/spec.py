"""Describes a ViT as plain data, found without running the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import nn

from covft.adapters.input_format import InputFormat


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One transformer block and its FFN.

    A block with several FFNs (in parallel, before and after the attention, for the pixels of a patch and for patches)
    has one spec per FFN, with the same path and different indices.

    Attributes:
        index: Index of the block, from 0.
        path: Dotted path of the block in the ViT, such as `blocks.3`.
        mlp: Attribute of the block that holds its FFN, such as `mlp`; dotted if nested.
        mlp_class: Class name of the FFN.
        embed_dim: Width D of the FFN's input and output tokens.
        ffn_dim: Inner width F of the FFN.
        ffn_parameters: Number of parameters of the FFN.
        norms: Dotted paths, within the block, of the affine norms outside its FFNs.
        layout: Axes of the FFN's input. `"BND"`: (images, tokens, width), with any number of axes between images and
            width, such as (images, height, width, channels). `"BCHW"`: channels second, as for convolutions.
            `"(BP)ND"`, `"(BP)CHW"`: each image is several consecutive rows, such as its windows, pixel positions or
            patches of pixels. `"TD"`, `"1TD"`: packed, see `InputFormat`.
        output: Attribute of the block that holds the second half of an FFN in two modules, the first being `mlp`;
            None if the FFN is one module.
        adds_residual: Whether the second half also gets the block's residual, and adds it.
        aliases: Other dotted paths in the ViT of the same FFN module, if it is used in several places.
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
        """Dotted path in the ViT of the second half of an FFN in two modules; None for others."""
        return None if self.output is None else f"{self.path}.{self.output}"


@dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """Describes a ViT as `wrap` sees it.

    An index, as in `layers=`, counts FFNs in the order in which they run. In a plain ViT it is the number of the block.
    Stages follow one another, whatever their widths; parallel branches are counted branch by branch within each step;
    final blocks that see only the class token count like all others; a block with two FFNs has two indices; an FFN that
    is used in several places has one.

    Attributes:
        library: `timm`, `open_clip`, `transformers`, or the name of another library.
        class_name: Class of the model.
        blocks: Its transformer blocks, one entry per FFN, in the order in which they run.
        input: Format of the model's input.
        image_size: Height (= width) of the images in pixels; None if variable or unknown.
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
        """Number of FFNs, which is the number of blocks if each has one."""
        return len(self.blocks)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """The second half of the blocks without the last one, which many MLLMs never read.

        In a ViT of one block, that block.
        """
        return tuple(range(max(self.depth // 2 - 1, 0), max(self.depth - 1, 1)))

    def __str__(self) -> str:
        return f"{self.library} {self.class_name}, {self.depth} blocks"


@runtime_checkable
class Adapter(Protocol):
    """Describes one kind of ViT. Implement it for a model that covft does not know.

    Most models need no code: a `ViTFamily` describes them with data.
    """

    @property
    def name(self) -> str:
        """Name of the adapter; unique in the registry."""
        ...

    def matches(self, vit: nn.Module) -> bool:
        """Return whether this adapter knows the model, without importing the model's library."""
        ...

    def describe(self, vit: nn.Module) -> ViTSpec:
        """Find blocks, FFNs and norms, without running or changing the model."""
        ...


def class_names(module: nn.Module) -> Iterator[str]:
    """Yield the qualified names of a module's class and its bases, such as `timm.models.eva.Eva`."""
    for cls in type(module).__mro__:
        yield f"{cls.__module__}.{cls.__qualname__}"
