"""Makes the inputs of each kind of vision tower of transformers: small images of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.transformers_configs import PATCH, SIZE, WIDTH

# Sides in patches of images of different sizes, one after another; no side is longer than SIZE // PATCH.
GRIDS = ((4, 4), (2, 4), (4, 2))
FRAMES = 2

Call = tuple[tuple[Any, ...], dict[str, Any]]
# The call of a tower on the images with these numbers.
Inputs = Callable[[nn.Module, Sequence[int]], Call]


def _noise(number: int, *shape: int) -> Tensor:
    """Return the image (or part of one) with a number."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def _stack(numbers: Sequence[int], *shape: int) -> Tensor:
    return torch.stack([_noise(number, *shape) for number in numbers])


def _grids(numbers: Sequence[int]) -> list[tuple[int, int]]:
    return [GRIDS[number % len(GRIDS)] for number in numbers]


def images(side: int = SIZE, **kwargs: Any) -> Inputs:
    """Return square images `(B, 3, side, side)`."""
    return lambda vit, numbers: ((_stack(numbers, 3, side, side),), dict(kwargs))


def named_images(name: str, side: int = SIZE) -> Inputs:
    """Return square images by keyword."""
    return lambda vit, numbers: ((), {name: _stack(numbers, 3, side, side)})


def videos(frames: int = FRAMES, side: int = SIZE, **kwargs: Any) -> Inputs:
    """Return videos `(B, T, 3, side, side)`."""
    return lambda vit, numbers: ((_stack(numbers, frames, 3, side, side),), dict(kwargs))


def tokens(*shape: int, **kwargs: Any) -> Inputs:
    """Return the inputs of a later part of a tower, `(B, *shape)`."""
    return lambda vit, numbers: ((_stack(numbers, *shape),), dict(kwargs))


def packed(
    *, frames: int = 1, temporal: int = 1, patch: tuple[int, ...] | None = None, axes: int = 0, **arguments: Any
) -> Inputs:
    """Return the patches of all images in one sequence, and `grid_thw`.

    Args:
        frames: Of each image (or video).
        temporal: Frames that make one patch.
        patch: Shape of a patch; None for a vector of all its numbers.
        axes: Axes of one before the patches.
        **arguments: Functions of the number of images, for further arguments.
    """
    shape = patch or (3 * temporal * PATCH * PATCH,)

    def make(vit: nn.Module, numbers: Sequence[int]) -> Call:
        grids = [(frames, *grid) for grid in _grids(numbers)]
        patches = [_noise(n, t * h * w, *shape) for n, (t, h, w) in zip(numbers, grids, strict=True)]
        pixels = torch.cat(patches)[(None,) * axes]
        further = {name: value(len(numbers)) for name, value in arguments.items()}
        return (pixels,), {"grid_thw": torch.tensor(grids), **further}

    return make


def packed_sizes(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """Pixtral: images on a canvas, and the size of each."""
    pixels = torch.zeros(len(numbers), 3, SIZE, SIZE)
    for row, (number, (height, width)) in enumerate(zip(numbers, _grids(numbers), strict=True)):
        pixels[row, :, : height * PATCH, : width * PATCH] = _noise(number, 3, height * PATCH, width * PATCH)
    return (pixels,), {"image_sizes": torch.tensor(_grids(numbers)) * PATCH}


def strip(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """MiniCPM-V: patches side by side in one long image, and the grid of each image."""
    patches = [_noise(n, 3, PATCH, PATCH * h * w) for n, (h, w) in zip(numbers, _grids(numbers), strict=True)]
    return (torch.cat(patches, dim=-1)[None],), {"target_sizes": torch.tensor(_grids(numbers), dtype=torch.int32)}


def merged_patches(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """Inkling 2: squares of patches, and grids that count squares."""
    grids = [(1, h // 2, w // 2) for h, w in _grids(numbers)]
    patches = [_noise(n, h * w, 2 * PATCH, 2 * PATCH, 3) for n, (_, h, w) in zip(numbers, grids, strict=True)]
    return (torch.cat(patches),), {"image_grid_thw": torch.tensor(grids)}


def padded(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """SigLIP 2: patches `(B, N, 3 * PATCH ** 2)` with noise as padding, a mask and the grids."""
    most = max(height * width for height, width in _grids(numbers))
    pixels = torch.full((len(numbers), most, 3 * PATCH * PATCH), 3.0)
    mask = torch.zeros(len(numbers), most, dtype=torch.int64)
    for row, (number, (height, width)) in enumerate(zip(numbers, _grids(numbers), strict=True)):
        pixels[row, : height * width] = _noise(number, height * width, 3 * PATCH * PATCH)
        mask[row, : height * width] = 1
    return (pixels,), {"pixel_attention_mask": mask, "spatial_shapes": torch.tensor(_grids(numbers))}


def canvas(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """Idefics 2 and 3: images on a canvas, and a mask of their patches, `(B, H, W)`."""
    rows = max(height for height, _ in _grids(numbers))
    columns = max(width for _, width in _grids(numbers))
    pixels = torch.full((len(numbers), 3, rows * PATCH, columns * PATCH), 3.0)
    mask = torch.zeros(len(numbers), rows, columns, dtype=torch.bool)
    for row, (number, (height, width)) in enumerate(zip(numbers, _grids(numbers), strict=True)):
        pixels[row, :, : height * PATCH, : width * PATCH] = _noise(number, 3, height * PATCH, width * PATCH)
        mask[row, :height, :width] = True
    return (pixels,), {"patch_attention_mask": mask}


def positions(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """Gemma 4: patches `(B, N, 3 * PATCH ** 2)` and the position of each, -1 for padding."""
    most = max(height * width for height, width in _grids(numbers))
    pixels = torch.full((len(numbers), most, 3 * PATCH * PATCH), 3.0)
    where = torch.full((len(numbers), most, 2), -1)
    for row, (number, (height, width)) in enumerate(zip(numbers, _grids(numbers), strict=True)):
        pixels[row, : height * width] = _noise(number, height * width, 3 * PATCH * PATCH)
        grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        where[row, : height * width] = torch.stack(grid, dim=-1).flatten(0, 1)
    return (pixels,), {"pixel_position_ids": where}


def flattened(width: int) -> Inputs:
    """Pix2Struct: patches with their row and column in front, zeros for padding, and a mask."""

    def make(vit: nn.Module, numbers: Sequence[int]) -> Call:
        most = max(rows * columns for rows, columns in _grids(numbers))
        patches, mask = torch.zeros(len(numbers), most, 2 + width), torch.zeros(len(numbers), most)
        for row, (number, (height, columns)) in enumerate(zip(numbers, _grids(numbers), strict=True)):
            count = height * columns
            place = torch.arange(count)
            patches[row, :count, 0], patches[row, :count, 1] = place // columns + 1, place % columns + 1
            patches[row, :count, 2:] = _noise(number, count, width)
            mask[row, :count] = 1
        return (patches,), {"attention_mask": mask}

    return make


def padded_tokens(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """Tokens of images of different sizes, and a mask."""
    most = max(height * width for height, width in _grids(numbers))
    states, mask = torch.full((len(numbers), most, WIDTH), 3.0), torch.zeros(len(numbers), most)
    for row, (number, (height, width)) in enumerate(zip(numbers, _grids(numbers), strict=True)):
        states[row, : height * width] = _noise(number, height * width, WIDTH)
        mask[row, : height * width] = 1
    return (states,), {"attention_mask": mask}


def tiles(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """Mllama: up to four tiles per image, and their number."""
    count = torch.tensor([(2, 1, 4)[number % 3] for number in numbers])
    mask = (torch.arange(4) < count[:, None]).long()
    pixels = _stack(numbers, 1, 4, 3, SIZE, SIZE) * mask[:, None, :, None, None, None]
    return (pixels,), {"aspect_ratio_ids": count[:, None], "aspect_ratio_mask": mask[:, None]}


def prompted(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """SegGPT: images, an example image for each, and the example's mask."""
    pixels = _stack(numbers, 3, SIZE, SIZE)
    return (pixels,), {"prompt_pixel_values": pixels.flip(-1), "prompt_masks": pixels.flip(-2)}


def masked(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """ViT-MAE: images, and the noise that decides which patches are dropped."""
    noise = torch.stack([_noise(number, (SIZE // PATCH) ** 2) for number in numbers])
    return (_stack(numbers, 3, SIZE, SIZE),), {"noise": noise}


def audio_and_video(vit: nn.Module, numbers: Sequence[int]) -> Call:
    """Perception Encoder: audio and video of the same length."""
    return (), {
        "input_values": _stack(numbers, 1, FRAMES * 1920),
        "pixel_values_videos": _stack(numbers, FRAMES, 3, SIZE, SIZE),
    }
