"""Maps each image to its row of the batch and to its tiles in the tower's batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import ShapeError
from covft.integrations.mllm.families import Layout

_FIX = "the call inside `with covft.get_encoder(model).condition(texts, index):`, where index[i] is the text of tile i"

# What transformers' own error says, which callers and its tests look for; covft comes first if it deals out the texts.
_MISMATCH = "Image features and image tokens do not match"


@dataclass(frozen=True)
class ImageMap:
    """Maps the images of a batch, in order.

    Attributes:
        tiles: The number of rows that each image takes in the tower's batch.
        rows: The row of `input_ids` of each image; None if unknown.
        problem: Why the rows are unknown.
    """

    tiles: list[int]
    rows: list[int] | None
    problem: str = ""

    def require_rows(self) -> list[int]:
        """Return the rows.

        Raises:
            ShapeError: If they are unknown.
        """
        if self.rows is None:
            raise ShapeError(
                "The row of each image is unknown.",
                expected="as many image placeholders in each row as its images need",
                got=self.problem,
                fix=_FIX,
            )
        return self.rows

    def spread(self, text_of_image: list[int]) -> Tensor:
        """Return the index for `encoder.condition`: the text of each row of the tower's batch."""
        return torch.tensor(text_of_image, dtype=torch.long).repeat_interleave(torch.tensor(self.tiles))


def map_images(
    layout: Layout, model: nn.Module, given: Mapping[str, Any], image_id: int | None, *, videos: bool = False
) -> ImageMap:
    """Map the images of a batch.

    Args:
        layout: As for `MLLMFamily`.
        model: The base model.
        given: Arguments of the call, by name: `pixel_values` with its sizes, `input_ids`.
        image_id: The placeholder of images, or of videos.
        videos: Whether to map the videos of a `"grid"` model instead, each of which is one image of its tower.

    Raises:
        ShapeError: If `pixel_values` does not have this layout.
    """
    pixel_values: Any = given.get("pixel_values")
    input_ids = given.get("input_ids")
    lengths: list[int] = []
    if layout == "padded":
        return _padded(pixel_values, getattr(model, "dtype", pixel_values.dtype), model)
    if layout == "rows":
        return _rows(pixel_values, given.get("aspect_ratio_ids"))
    if layout == "grid":
        lengths = _grid_lengths(model, given, "video_grid_thw" if videos else "image_grid_thw")
    elif layout == "sizes":
        lengths = _sizes_lengths(model, given)
    if layout in ("grid", "sizes"):
        tiles = [1] * len(lengths)
    else:
        tiles = _tiles(model, given) if layout == "anyres" else _plain(pixel_values)
    if input_ids is None or image_id is None:
        return ImageMap(tiles, None, "no input_ids" if input_ids is None else "no image placeholder")
    placeholders = (input_ids == image_id).sum(dim=1).tolist()
    if layout == "anyres":
        lengths = _anyres_lengths(model, given, tiles)
    elif layout == "plain" and tiles and sum(placeholders) % len(tiles) == 0:
        lengths = [sum(placeholders) // len(tiles)] * len(tiles)
    elif layout == "plain":
        return ImageMap(tiles, None, f"{_MISMATCH}: {placeholders} placeholders per row for {len(tiles)} images")
    rows = _deal(placeholders, lengths)
    return ImageMap(tiles, rows, f"{_MISMATCH}: {placeholders} placeholders per row; the images need {lengths}")


def groups_of(layout: Layout, placement: ImageMap, pixel_values: Any, num_rows: int | None) -> list[int] | None:
    """Return how many rows of the tower's batch `generate` repeats together for beams, in order; None if unknown.

    Models repeat each entry of `pixel_values` (an image of a `"plain"` model, all tiles of an image, all images of a
    row), or all segments of a row of `input_ids`.

    Args:
        layout: As for `MLLMFamily`.
        placement: The images of the batch.
        pixel_values: Those images; None for videos.
        num_rows: Rows of `input_ids`; None without them.
    """
    if layout == "rows":
        return [pixel_values.shape[1]] * len(pixel_values)
    if layout not in ("padded", "grid"):
        return placement.tiles
    if placement.rows is None:
        return [len(placement.tiles)] if num_rows == 1 else None
    return [len(list(images)) for _, images in itertools.groupby(placement.rows)]


def _deal(placeholders: list[int], lengths: list[int]) -> list[int] | None:
    """Assign images to rows in order, so that they fill each row's placeholders exactly; None if they do not."""
    rows: list[int] = []
    for row, left in enumerate(placeholders):
        while left > 0 and len(rows) < len(lengths):
            left -= lengths[len(rows)]
            rows.append(row)
        if left != 0:
            return None
    return rows if len(rows) == len(lengths) else None


def _rows(pixel_values: Tensor, aspect_ratio_ids: Tensor | None) -> ImageMap:
    """Map images of rows that are padded to equal counts; padding belongs to the image before it."""
    _check_dims(pixel_values, (6,), "(rows, images, tiles, 3, H, W)")
    num_rows, num_images = pixel_values.shape[:2]
    real = torch.ones(num_rows * num_images, dtype=torch.bool)
    if aspect_ratio_ids is not None and aspect_ratio_ids.any():
        real = aspect_ratio_ids.flatten().bool().cpu()  # 0 is padding
    starts = real.nonzero().squeeze(-1)
    rows = (starts // num_images).tolist()
    starts[0] = 0
    ends = torch.cat([starts[1:], torch.tensor([len(real)])])
    return ImageMap((ends - starts).tolist(), rows)


def _grid_lengths(model: Any, given: Mapping[str, Any], name: str) -> list[int]:
    """Return the number of placeholders of each image: one for each square of patches that the model merges."""
    grid = given.get(name)
    if grid is None:
        raise ShapeError(f"The images have no {name}.", expected=f"{name} of shape (images, 3)", got="none")
    merged = model.config.vision_config.spatial_merge_size
    return (grid.prod(dim=-1) // merged**2).tolist()


def _sizes_lengths(model: Any, given: Mapping[str, Any]) -> list[int]:
    """Return the number of placeholders of each image of a Pixtral tower."""
    pixel_values, sizes = given["pixel_values"], given.get("image_sizes")
    if sizes is None:
        sizes = [pixel_values.shape[-2:]] * len(pixel_values)
    merged = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
    return (torch.as_tensor(sizes) // merged).prod(dim=-1).tolist()


def _plain(pixel_values: Tensor) -> list[int]:
    _check_dims(pixel_values, (3, 4), "(images, 3, H, W)")  # 3: images as patches
    return [1] * len(pixel_values)


def _padded(pixel_values: Tensor, dtype: torch.dtype, model: Any) -> ImageMap:
    _check_dims(pixel_values, (5,), "(rows, images, 3, H, W)")
    real = (pixel_values.to(dtype) != 0).flatten(2).any(dim=2)
    if model.config.model_type == "smolvlm" and not real.any():
        real[0, 0] = True  # it keeps one image of zeros for a batch without images
    rows = real.nonzero()[:, 0].tolist()
    return ImageMap([1] * len(rows), rows)


def _check_dims(pixel_values: Tensor, dims: tuple[int, ...], expected: str) -> None:
    if pixel_values.dim() not in dims:
        raise ShapeError(
            "The model does not take images of this shape.",
            expected=f"pixel_values of shape {expected}",
            got=tuple(pixel_values.shape),
            fix=_FIX,
        )


def _tiles(model: Any, given: Mapping[str, Any]) -> list[int]:
    """Return the number of tiles of each image, by the model's own rule."""
    import importlib

    pixel_values, sizes, counts = given["pixel_values"], given.get("image_sizes"), given.get("batch_num_images")
    if sizes is None:
        raise ShapeError("The images have no image_sizes.", expected="image_sizes of shape (images, 2)")
    count_patches = importlib.import_module(type(model).__module__).image_size_to_num_patches
    alone = [True] * len(sizes)
    if counts is not None:
        alone = [int(count) == 1 for count in counts for _ in range(int(count))]
    config = model.config
    tiles = [
        count_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if tiled else 1
        for size, tiled in zip(sizes, alone, strict=True)
    ]
    if pixel_values.dim() == 5:
        return [min(count, pixel_values.shape[1]) for count in tiles]
    if sum(tiles) != len(pixel_values):
        raise ShapeError(
            "pixel_values does not fit image_sizes.",
            expected=f"{sum(tiles)} tiles: {tiles}",
            got=tuple(pixel_values.shape),
        )
    return tiles


def _anyres_lengths(model: Any, given: Mapping[str, Any], tiles: list[int]) -> list[int]:
    """Return the number of placeholders of each image: the model's own packing, run on features of width 1."""
    vision = model.config.vision_config
    features = [torch.zeros(count, (vision.image_size // vision.patch_size) ** 2, 1) for count in tiles]
    options: dict[str, Any] = {"image_newline": torch.zeros(1)}
    if hasattr(model.config, "vision_aspect_ratio"):
        options["vision_aspect_ratio"] = given.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
    else:
        options["vision_feature_select_strategy"] = "full"
    with torch.no_grad():
        packed, _ = model.pack_image_features(features, given["image_sizes"], **options)
    return [len(image) for image in packed]
