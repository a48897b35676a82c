"""Averages squares of patches between the tower and the projector of a LLaVA.

Shapes: B images, N patches, D width of the tower.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from covft.errors import CheckpointError, ConfigError, CoVFTError, ShapeError
from covft.integrations.building.projector import find_projector
from covft.utils.arguments import check_kinds

FIELD = "covft_pooling"  # of the model's config: the side of the squares
_HANDLE = "_covft_pooling"  # of the projector: the handle of its hook


class Pooling:
    """Averages squares of patches; a forward pre-hook of the projector."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the patches that the projector gets."""
        patches, *rest = args
        return (averaged_squares(patches, self.side), *rest)


def averaged_squares(patches_BND: Tensor, side: int) -> Tensor:
    """Average the patches of each square of a square grid, shape `(B, N / side^2, D)`.

    Args:
        patches_BND: Patches row by row, shape `(B, N, D)`.
        side: Height and width of the squares, in patches.

    Raises:
        ShapeError: If the grid is not square, or does not divide into such squares.
    """
    images, patches, width = patches_BND.shape
    grid = math.isqrt(patches)
    if grid * grid != patches or grid % side:
        raise ShapeError(
            f"The patches do not divide into squares of {side} x {side}.",
            expected=f"a square grid whose side is a multiple of {side}",
            got=f"{patches} patches",
        )
    left = grid // side
    squares = patches_BND.reshape(images, left, side, left, side, width)
    return squares.mean((2, 4)).flatten(1, 2)


@check_kinds
def pool_patches(model: nn.Module, side: int) -> None:
    """Give the language model of a LLaVA one token for each square of patches: their mean, before the projector.

    A saved model says so in its config, and `covft.load_model` restores it. Build the processor afterwards
    (`llava_processor`): it writes one placeholder per token.

    Args:
        model: A `LlavaForConditionalGeneration`, in place.
        side: Height and width of the squares, in patches.

    Raises:
        ConfigError: If the model is not a LLaVA, is pooled already, or its patches do not divide into such squares.

    Example:
        >>> from covft.testing import tiny_llava
        >>> model = tiny_llava().model
        >>> _ = pool_patches(model, 2)
        >>> model.config.covft_pooling
        2
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "llava":
        raise ConfigError("Only a LLaVA pools its patches.", expected="a LLaVA", got=type(model).__name__)
    projector = find_projector(model)
    if _HANDLE in projector.__dict__:
        raise ConfigError(
            "This model pools its patches already.", expected="a model that does not", got="one that does"
        )
    grid = config.vision_config.image_size // config.vision_config.patch_size
    if isinstance(side, bool) or not 1 <= side <= grid or grid % side:
        raise ConfigError(
            f"Squares of {side} x {side} do not divide {grid} x {grid} patches.",
            expected=" | ".join(str(n) for n in range(1, grid + 1) if grid % n == 0),
            got=side,
        )
    setattr(config, FIELD, side)
    config.image_seq_length = (grid // side) ** 2
    projector.__dict__[_HANDLE] = projector.register_forward_pre_hook(Pooling(side))


@check_kinds
def unpool_patches(model: nn.Module) -> None:
    """Undo `pool_patches`.

    Args:
        model: A model that it has changed.

    Raises:
        ConfigError: If it has not.
    """
    config, projector = getattr(model, "config", None), find_projector(model)
    handle = projector.__dict__.pop(_HANDLE, None)
    if handle is None:
        raise ConfigError("This model does not pool its patches.", expected="a model after pool_patches", got="another")
    handle.remove()
    delattr(config, FIELD)


def restore_pooling(model: nn.Module) -> None:
    """Pool the patches of a loaded model whose config says so.

    Args:
        model: The model.

    Raises:
        CheckpointError: If the config asks for what cannot be.
    """
    side = getattr(getattr(model, "config", None), FIELD, None)
    if side is None:
        return
    try:
        if _HANDLE not in find_projector(model).__dict__:
            pool_patches(model, side)
    except CoVFTError as error:
        raise CheckpointError(
            f"The model's config says {FIELD}={side!r}, which cannot be.", expected=error.expected, got=error.got
        ) from error
