"""Dummy images for batches without images: the tower encodes them, and their features are dropped.

Every process then runs the tower on every batch and builds the same graph; otherwise the processes of DDP, FSDP and
ZeRO would wait for each other forever. The features are cut off, not multiplied by zero: they stay in the graph with a
gradient of exactly zero, whatever their values.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from covft.errors import ShapeError

_METHOD = "get_image_features"


@contextlib.contextmanager
def without_dummies(model: nn.Module, image_flags: Tensor | None) -> Iterator[None]:
    """Drop the features of dummy images inside this context.

    Args:
        model: The base model, whose forward calls its own `get_image_features`.
        image_flags: 1 for an image and 0 for a dummy, shape `(B,)`; None if there are no dummies.
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
    """Replaces `get_image_features` and returns the features of real images only."""

    def __init__(self, inner: Any, flags: list[bool]) -> None:
        self.inner, self.flags = inner, flags

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _takes_return_dict(self.inner):
            kwargs["return_dict"] = True
        output = self.inner(*args, **kwargs)
        features = getattr(output, "pooler_output", output)  # before release 5 of transformers: no more than those
        if len(features) != len(self.flags):
            raise ShapeError(
                "image_flags does not fit the images.",
                expected=f"image_flags of shape ({len(features)},)",
                got=f"{len(self.flags)} flags",
            )
        real = [number for number, flag in enumerate(self.flags) if flag]
        if isinstance(features, Tensor):
            kept: Any = features[real]
        else:  # one tensor per image; an empty slice keeps the dummy in the graph
            kept = [features[number] for number in real] or [features[0][:0]]
        if features is output:
            return kept
        output.pooler_output = kept
        return output


def _takes_return_dict(method: Any) -> bool:
    parameters = inspect.signature(method).parameters
    return "return_dict" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
