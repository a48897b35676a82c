"""Packed batches: the tokens of all images one after another, without an axis for images.

Shapes: B images, T tokens of all images of a packed batch, N tokens of the longest image, D embed_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from covft.utils.arguments import check_kinds


class Segments:
    """Which tokens of a packed sequence belong to which image; those of an image are contiguous.

    Args:
        lengths: Tokens of each image, in order.
        device: Device of the indices.

    Attributes:
        ids_T: The image that each token belongs to, shape `(T,)`.
        mask_BN: True where `per_image` puts a token, and at the first place of an image without tokens, shape `(B, N)`;
            None if all images are equally long.

    Example:
        >>> segments = Segments([2, 1])
        >>> segments.ids_T.tolist()
        [0, 0, 1]
        >>> segments.per_image(torch.ones(3, 1))[..., 0].tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """

    @check_kinds
    def __init__(self, lengths: Sequence[int], device: torch.device | str | None = None) -> None:
        self.lengths = tuple(lengths)
        # Built on the CPU, without waiting for another device.
        lengths_B = torch.tensor(self.lengths, dtype=torch.long)
        longest = max(self.lengths, default=0)
        self.ids_T = torch.arange(len(self.lengths)).repeat_interleave(lengths_B).to(device)
        self.mask_BN: Tensor | None = None
        self._places_T: Any = None  # of each token among the B * N of `per_image`
        if any(length != longest for length in self.lengths):
            mask_BN = torch.arange(longest) < lengths_B[:, None]
            # An image without tokens still needs a context: it gets that of one token of zeros.
            first_N = torch.arange(longest) == 0
            self.mask_BN = (mask_BN | ((lengths_B == 0)[:, None] & first_N)).to(device)
            self._places_T = mask_BN.flatten().nonzero().squeeze(-1).to(device)

    @classmethod
    def of_sizes(
        cls,
        sizes: Tensor | Sequence[Sequence[int]],
        unit: int = 1,
        device: torch.device | str | None = None,
        *,
        square: int = 1,
        extra: int = 0,
    ) -> Segments:
        """Make the segments of images of known sizes.

        Args:
            sizes: Sides of each image, such as (frames, height, width), shape `(B, sides)`.
            unit: Length of a side per token, such as the patch size where sides are pixels.
            device: Device of the indices.
            square: Side in tokens of the squares that `sizes` counts.
            extra: Additional tokens of each image, such as a class token.

        Example:
            >>> Segments.of_sizes([(28, 56), (14, 14)], unit=14).lengths
            (8, 1)
            >>> Segments.of_sizes([(1, 2, 3)], square=2, extra=1).lengths
            (25,)
        """
        rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        return cls([math.prod(int(side) // unit for side in row) * square**2 + extra for row in rows], device)

    def merged(self, num_tokens: int) -> Segments:
        """Return the segments after equally many neighbouring tokens of each image were merged into one.

        Args:
            num_tokens: Tokens of all images after merging.

        Returns:
            The segments; itself if the number is unchanged, or if no such merging explains it.
        """
        share, rest = divmod(self.num_tokens, num_tokens) if num_tokens else (1, 0)
        if share == 1 or rest or any(length % share for length in self.lengths):
            return self
        return Segments([length // share for length in self.lengths], self.ids_T.device)

    def __len__(self) -> int:
        """Number of images B."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> Segments:
        """Return these segments on a device; itself if it is there already."""
        return self if self.ids_T.device == device else Segments(self.lengths, device)

    def per_image(self, tokens_TD: Tensor) -> Tensor:
        """Give tokens an axis for images, shape `(B, N, D)`; zeros where `mask_BN` is False."""
        images, width = len(self), tokens_TD.shape[-1]
        if self.mask_BN is None:
            return tokens_TD.reshape(images, -1, width)
        padded = tokens_TD.new_zeros(self.mask_BN.numel(), width).index_copy(0, self._places_T, tokens_TD)
        return padded.view(images, -1, width)
