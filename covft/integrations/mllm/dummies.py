"""Rows without an image: a dummy goes through the tower, and its features go nowhere.

Every process then runs the tower on every batch and builds the same graph, without which DDP, FSDP and ZeRO wait for
each other for ever. The features are cut out of what the language model sees, not multiplied by zero: cutting leaves
them in the graph with a gradient of exactly zero, whatever they hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from covft.errors import ShapeError

_METHOD = "get_image_features"


@contextlib.contextmanager
def without_dummies(model: nn.Module, image_flags: Tensor | None) -> Iterator[None]:
    """Drop the features of dummies from what the model makes of its images inside this context.

    Args:
        model: The base model, whose `get_image_features` its own forward calls.
        image_flags: 1 for an image and 0 for a dummy, shape `(T,)`; None where there are none.
    """
    if image_flags is None or bool(image_flags.bool().all()):
        yield
        return
    before = model.__dict__.get(_METHOD)
    model.__dict__[_METHOD] = _Kept(getattr(model, _METHOD), image_flags.bool().tolist())
    try:
        yield
    finally:
        del model.__dict__[_METHOD]
        if before is not None:
            model.__dict__[_METHOD] = before


class _Kept:
    """Stands for `get_image_features` and hands on the features of real images.

    Args:
        inner: The model's own method.
        flags: Whether each image is one.
    """

    def __init__(self, inner: Any, flags: list[bool]) -> None:
        self.inner, self.flags = inner, flags

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **{**kwargs, "return_dict": True})
        features = output.pooler_output
        if len(features) != len(self.flags):
            raise ShapeError(
                "There is not one flag per image.",
                expected=f"image_flags of shape ({len(features)},)",
                got=f"{len(self.flags)} flags",
            )
        real = [number for number, flag in enumerate(self.flags) if flag]
        if isinstance(features, Tensor):
            output.pooler_output = features[real]
        else:  # one tensor per image; of the dummy nothing is left but its graph
            output.pooler_output = [features[number] for number in real] or [features[0][:0]]
        return output
