"""How images reach a ViT: the arguments and axes that tell which tokens belong to which image."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """What a call of a ViT tells about its images.

    In a `ViTFamily`, `mask_unit`, `sizes_unit` and `sizes_square` may be a dotted attribute of the model; in a
    `ViTSpec` they are numbers.

    Attributes:
        layout: Shape of the tokens at the FFNs. `"BND"`: there is an axis for images; each block's own layout says
            where. `"TD"`: packed, the tokens of all images one after another. `"1TD"`: the same below an axis of one.
        prefix_tokens: Tokens before the patches (class token, registers); None if unknown.
        mask_argument: Argument of the model that marks real tokens, shape `(B, N)`; None if there is none.
        mask_unit: Number of real tokens in a tile, where an entry of the mask stands for a tile and the tokens after
            them are padding. None where an entry stands for a token.
        mask_padding: Value of every entry of a padding token, where the argument gives several numbers per token (such
            as its row and column). None for a mask.
        image_axes: Number of leading axes of the model's input, and of the mask, that count images.
        sizes_argument: Argument of a packed model that gives the sides of each image, shape `(B, sides)`. An image has
            as many tokens as the product of its sides, and its prefix tokens.
        sizes_unit: Length of a side that makes one token.
        sizes_square: Side of the square of tokens that a unit of size stands for.
        merges: Whether a packed model merges equally many neighbouring tokens into one on the way.
    """

    layout: str = "BND"
    prefix_tokens: int | None = None
    mask_argument: str | None = None
    mask_unit: int | str | None = None
    mask_padding: int | None = None
    image_axes: int = 1
    sizes_argument: str | None = None
    sizes_unit: int | str = 1
    sizes_square: int | str = 1
    merges: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether the FFNs see all images of a batch as one sequence of tokens."""
        return self.sizes_argument is not None

    def resolved(self, vit: nn.Module, prefix_tokens: int | None) -> InputFormat:
        """Replace dotted attributes by the model's own numbers.

        Args:
            vit: The model.
            prefix_tokens: Tokens before the patches.
        """
        numbers = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and field.name in ("mask_unit", "sizes_unit", "sizes_square"):
                numbers[field.name] = int(lookup(vit, value))
        return replace(self, prefix_tokens=prefix_tokens, **numbers)


def lookup(root: Any, path: str) -> Any:
    """Follow a dotted path of attributes; None if one is missing.

    Args:
        root: Where the path starts.
        path: Such as `config.patch_size`.
    """
    for name in path.split("."):
        root = getattr(root, name, None)
        if root is None:
            return None
    return root
