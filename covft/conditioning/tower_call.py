"""Reads from a call of the tower how many images there are, and which tokens belong to each.

Shapes: B images, N tokens of an image, D embed_dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.input_format import InputFormat
from covft.errors import ShapeError
from covft.nn.segments import Segments


class TowerCall:
    """The batch of one run of the tower.

    Args:
        format: How images reach the tower.
        num_images: Number of images B; None where the input does not tell.
        mask_BN: True where a token counts, shape `(B, N)`; None where all do.
        segments: Which tokens belong to which image in a packed tower; None elsewhere.
    """

    __slots__ = ("format", "mask_BN", "num_images", "segments")

    def __init__(
        self, format: InputFormat, num_images: int | None, mask_BN: Tensor | None, segments: Segments | None
    ) -> None:
        self.format = format
        self.num_images = num_images
        self.mask_BN = mask_BN
        self.segments = segments

    @classmethod
    def read(cls, format: InputFormat, vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> TowerCall:
        """Read the arguments of a call, before any compute.

        Args:
            format: How images reach the tower.
            vit: The tower.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            ShapeError: If images are packed in a way that is not known.
        """
        images = _images(vit, args, kwargs)
        packed = isinstance(images, Tensor) and images.is_floating_point() and images.dim() == 2
        if packed and not format.is_packed:
            raise ShapeError(
                f"{type(vit).__name__} was given patches as one sequence; which image each belongs to is not known.",
                expected="images (B, 3, H, W), or tokens (B, N, D)",
                got=f"shape {tuple(images.shape)}",
                fix="one call per image size; or adapter=ViTFamily(..., input=InputFormat(layout='TD', "
                "sizes_argument=...))",
            )
        segments = _segments(format, vit, args, kwargs, images)
        num_images = _count(format, images) if segments is None else len(segments)
        return cls(format, num_images, _mask(format, vit, args, kwargs), segments)

    def mask_for(self, num_tokens: int) -> Tensor | None:
        """Return which of an FFN's tokens count, shape `(B, num_tokens)`; None where all do.

        Args:
            num_tokens: Tokens of each image N.

        Raises:
            ShapeError: If the mask is for another number of tokens.
        """
        mask, unit = self.mask_BN, self.format.mask_unit
        if mask is None:
            return None
        mask = mask | ~mask.any(dim=1, keepdim=True)  # an image that is all padding still needs a context
        if unit is None:
            return self._with_prefix(mask, num_tokens)
        in_tile = torch.arange(num_tokens // mask.shape[1], device=mask.device) < int(unit)
        return (mask[..., None] & in_tile).flatten(1)

    def segments_for(self, x: Tensor) -> Segments | None:
        """Return which tokens of a packed tower's FFN belong to which image; None for other towers.

        Args:
            x: Tokens as the FFN gets them.
        """
        if self.segments is None:
            return None
        segments = self.segments.merged(x.shape[-2]) if self.format.merges else self.segments
        return segments.to(x.device)

    def _with_prefix(self, mask_BN: Tensor, num_tokens: int) -> Tensor:
        prefix = self.format.prefix_tokens or 0
        if mask_BN.shape[1] == num_tokens:
            return mask_BN
        if mask_BN.shape[1] + prefix != num_tokens:
            raise ShapeError(
                f"{self.format.mask_argument} does not cover the tokens that an FFN sees.",
                expected=f"{num_tokens} entries per image, or that less {prefix} prefix tokens",
                got=f"{mask_BN.shape[1]} entries",
            )
        return torch.nn.functional.pad(mask_BN, (prefix, 0), value=True)


def _count(format: InputFormat, images: Any) -> int | None:
    if isinstance(images, Mapping):
        images = images.get("patches")
    if isinstance(images, Tensor) and (images.dim() in (3, 4) or format.image_axes > 1):
        return math.prod(images.shape[: format.image_axes])
    return None


def _mask(format: InputFormat, vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    if format.mask_argument is None:
        return None
    mask = _argument(vit, args, kwargs, format.mask_argument)
    if mask is None and args and isinstance(args[0], Mapping):
        mask = args[0].get(format.mask_argument)
    if mask is not None and format.mask_padding is not None:
        mask = (mask != format.mask_padding).any(dim=-1)
    return None if mask is None else mask.flatten(0, format.image_axes - 1).flatten(1).bool()


def _segments(format: InputFormat, vit: nn.Module, args: tuple, kwargs: dict[str, Any], images: Any) -> Segments | None:
    if format.sizes_argument is None or not isinstance(images, Tensor):
        return None
    sizes = _argument(vit, args, kwargs, format.sizes_argument)
    if sizes is None:
        if images.dim() != 4:
            return None  # the ViT itself says what is missing
        sizes = [images.shape[-2:]] * len(images)
    unit, square = int(format.sizes_unit), int(format.sizes_square)
    return Segments.of_sizes(sizes, unit, images.device, square=square, extra=format.prefix_tokens or 0)


def _images(vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the images of a call, positional or by name; None if there are none."""
    if args:
        return args[0]
    name = getattr(vit, "main_input_name", "pixel_values")
    return kwargs[name] if name in kwargs else kwargs.get(next(iter(inspect.signature(vit.forward).parameters), ""))


def _argument(vit: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """Return an argument of a call, positional or by name; None if it was not given."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    position = list(inspect.signature(vit.forward).parameters).index(name)
    return args[position] if position < len(args) else None
