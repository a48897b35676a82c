"""Axes of the tensor that an FFN gets: where images, tokens and channels are.

Shapes: B images, P parts of an image that are rows of their own, N tokens of a row, D embed_dim, H and W sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from covft.errors import ShapeError

LAYOUTS = ("BND", "BCHW", "(BP)ND", "(BP)CHW")


class TokenLayout:
    """Reads tokens of images out of the tensor that an FFN gets.

    Args:
        name: `"BND"`: (images, tokens, width), with any number of axes for the tokens, such as (images, height, width,
            width). `"BCHW"`: (images, width, height, width of the map). `"(BP)ND"` and `"(BP)CHW"`: the same, but
            each image is several rows, one after another.

    Attributes:
        is_plain: Whether tokens need no rearranging at all.
        is_folded: Whether a row may be a part of an image.

    Example:
        >>> TokenLayout("BCHW").tokens(torch.rand(2, 8, 3, 3), 2).shape
        torch.Size([2, 9, 8])
        >>> TokenLayout("(BP)ND").tokens(torch.rand(6, 5, 8), 2).shape
        torch.Size([2, 15, 8])
    """

    def __init__(self, name: str = "BND") -> None:
        self.name = name
        self.is_plain = name in ("BND", "TD", "1TD")
        self.is_folded = name.startswith("(BP)")
        self._channels_first = name.endswith("CHW")

    def tokens(self, x: Tensor, num_images: int) -> Tensor:
        """Return the tokens of each image, shape `(B, ..., D)`.

        Args:
            x: What the FFN gets.
            num_images: Number of images B.

        Raises:
            ShapeError: If the rows cannot be split evenly among so many images.
        """
        if self.is_folded:
            self._rows_per_image(x, num_images)
        if self._channels_first:
            x = x.flatten(2).transpose(1, 2)
        return x.reshape(num_images, -1, x.shape[-1]) if self.is_folded else x

    def image_of_rows(self, x: Tensor, num_images: int) -> Tensor:
        """Return the image that each row of a folded tensor belongs to, shape `(B * P,)`."""
        parts = self._rows_per_image(x, num_images)
        return torch.arange(num_images, device=x.device).repeat_interleave(parts, output_size=len(x))

    def _rows_per_image(self, x: Tensor, num_images: int) -> int:
        if not num_images or len(x) % num_images:
            raise ShapeError(
                "The rows that an FFN sees cannot be split among the images.",
                expected=f"a multiple of {num_images} rows, the same number for each image",
                got=f"{len(x)} rows",
            )
        return len(x) // num_images
