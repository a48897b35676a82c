"""The format of a ViT's input: the arguments and axes that assign tokens to images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from covft.utils.arguments import check_kinds


@check_kinds
@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """Assigns the tokens of a ViT to the images of a call.

    In a `ViTFamily`, `mask_unit`, `sizes_unit` and `sizes_square` may be dotted attributes of the model; in a
    `ViTSpec` they are numbers.

    Attributes:
        layout: Shape of the tokens at the FFNs. `"BND"`: with an axis for images, whose place is in each block's own
            layout. `"TD"`: packed, the tokens of all images in one sequence. `"1TD"`: packed, after an axis of one.
        prefix_tokens: Number of tokens before the patches (class token, registers); None if unknown.
        mask_argument: Argument of the model that marks real tokens, shape `(B, N)`; None without one.
        mask_unit: Number of real tokens in a tile, if an entry of the mask stands for a tile whose last tokens are
            padding. None if an entry stands for a token.
        mask_padding: Value of every entry of a padding token, if the argument gives several numbers per token (such
            as its row and column). None for a mask.
        image_axes: Number of leading axes of the model's input, and of the mask, that count images.
        sizes_argument: Argument of a packed model with the sides of each image, shape `(B, sides)`. The number of
            tokens of an image is the product of its sides, plus its prefix tokens.
        sizes_unit: Length of a side per token.
        sizes_square: Side, in tokens, of the square that a unit of size stands for.
        merges: Whether a packed model merges neighbouring tokens between blocks, the same number everywhere.
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
        """Return the format with the model's numbers in place of dotted attributes.

        Args:
            vit: The model.
            prefix_tokens: Number of tokens before the patches.
        """
        numbers = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and field.name in ("mask_unit", "sizes_unit", "sizes_square"):
                numbers[field.name] = int(lookup(vit, value))
        return replace(self, prefix_tokens=prefix_tokens, **numbers)


def lookup(root: Any, path: str) -> Any:
    """Return the attribute at a dotted path such as `config.patch_size`; None if it is missing.

    Args:
        root: Object that the path starts at.
        path: The path.
    """
    for name in path.split("."):
        root = getattr(root, name, None)
        if root is None:
            return None
    return root
