"""Batches samples: padded tokens, images with the index of their row, instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from covft.data.checks import short, whole
from covft.data.conversation import IGNORE_INDEX
from covft.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Collator:
    """Batches samples of a `ConversationDataset`.

    A row without images gets a dummy image of zeros, so that every rank runs the vision tower on every batch and all
    ranks build the same graph; `drop_dummies` removes its features.

    Attributes:
        pad_token_id: Padding of `input_ids`.
        image_shape: Channels, height and width of a dummy, `dataset.image_shape`. None takes the shape of the batch's
            images; a batch without images is then an error.
        dummies: `"row"` adds a dummy to every row without images, `"batch"` one to a batch without images, `"none"`
            none: a batch without images then has no `pixel_values`.
        padding_side: `"right"` for training, `"left"` for generation.
        pad_to_multiple_of: The padded length is a multiple of this.

    Raises:
        ConfigError: If a setting is invalid.
    """

    pad_token_id: int
    image_shape: tuple[int, int, int] | None = None
    dummies: str = "row"
    padding_side: str = "right"
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int) or isinstance(self.pad_token_id, bool):
            raise ConfigError(
                "The collator needs the id of a padding token.",
                expected="an int",
                got=repr(self.pad_token_id),
                fix="tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token",
            )
        for name, known in (("dummies", ("row", "batch", "none")), ("padding_side", ("right", "left"))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ConfigError(
                    f"{name}={short(value)} is unknown.",
                    expected=" | ".join(known),
                    got=short(value),
                    fix=known[0],
                )
        whole(self.pad_to_multiple_of, "pad_to_multiple_of", least=1)
        shape = self.image_shape
        if shape is not None and (not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 3):
            raise ConfigError(
                f"image_shape={short(shape)} is not a shape.",
                expected="(channels, height, width)",
                got=short(shape),
                fix="image_shape=dataset.image_shape",
            )
        for size in shape or ():
            whole(size, "image_shape", least=1)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad and stack the samples.

        Returns:
            `input_ids`, `labels`, `attention_mask` (R, L); `pixel_values` (B, 3, H, W), the tiles of all rows;
            `context_index` (B,), the row of each tile (the `index` of a `ContextEncoder`); `image_flags` (B,), 1 for an
            image and 0 for a dummy; `num_tiles`, a list per row; `context_text`, R strings, or None for rows
            without a text.

        Raises:
            ConfigError: If the samples are not those of a `ConversationDataset`.
            ShapeError: If images differ in size, or there are neither images nor `image_shape`.
        """
        _check_samples(samples)
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, Any] = {
            "input_ids": self._pad([s["input_ids"] for s in samples], length, self.pad_token_id),
            "labels": self._pad([s["labels"] for s in samples], length, IGNORE_INDEX),
            "attention_mask": self._pad([torch.ones_like(s["input_ids"]) for s in samples], length, 0),
            "context_text": [sample["context_text"] for sample in samples],
            "num_tiles": [list(sample.get("num_tiles", [])) for sample in samples],
        }
        return {**batch, **self._images([sample.get("pixel_values") for sample in samples])}

    def _pad(self, rows: Sequence[torch.Tensor], length: int, value: int) -> torch.Tensor:
        padded = torch.full((len(rows), length), value, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if self.padding_side == "right" else slice(length - len(row), length)
            padded[number, place] = row
        return padded

    def _images(self, images: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        real = [image for image in images if image is not None]
        if self.dummies == "none" and not real:
            return {}
        shape = self._shape(real)
        blank = torch.zeros(1, *shape, dtype=real[0].dtype if real else torch.float32)
        stacked, rows, flags = [], [], []
        for row, image in enumerate(images):
            if image is None:
                if self.dummies == "none" or (self.dummies == "batch" and (real or row)):
                    continue
                stacked.append(blank)
            else:
                stacked.append(image)
            rows += [row] * len(stacked[-1])
            flags += [int(image is not None)] * len(stacked[-1])
        return {
            "pixel_values": torch.cat(stacked),
            "context_index": torch.tensor(rows, dtype=torch.int64),
            "image_flags": torch.tensor(flags, dtype=torch.int64),
        }

    def _shape(self, real: Sequence[torch.Tensor]) -> tuple[int, ...]:
        shapes = {tuple(image.shape[1:]) for image in real}
        if len(shapes) > 1:
            raise ShapeError(
                "The images of a batch differ in size, so they cannot be stacked.",
                expected="one size for all",
                got=" and ".join(map(str, sorted(shapes))),
                fix="an image processor that resizes to one size, tiling=PadToSquare() or tiling=DynamicTiling()",
            )
        if shapes:
            return shapes.pop()
        if self.image_shape is None:
            raise ShapeError(
                "The batch has no images, so the size of a dummy image is unknown.",
                fix="Collator(pad_token_id, image_shape=dataset.image_shape)",
            )
        return self.image_shape


def _check_samples(samples: Any) -> None:
    is_list = isinstance(samples, Sequence) and not isinstance(samples, (str, bytes))
    good = is_list and all(
        isinstance(sample, Mapping)
        and all(_is_tensor(sample.get(key), 1) for key in ("input_ids", "labels"))
        and isinstance(sample.get("context_text", 0), str | None)
        and (sample.get("pixel_values") is None or _is_tensor(sample["pixel_values"], 4))
        for sample in samples
    )
    if not good or not samples:
        raise ConfigError(
            "The collator cannot batch these samples.",
            expected="samples of a ConversationDataset, at least one",
            got=short(samples) if is_list else type(samples).__name__,
        )


def _is_tensor(value: Any, dims: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == dims


def drop_dummies(features: torch.Tensor, image_flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove the features of dummy images, but keep them in the graph.

    Args:
        features: Features of all tiles, shape `(T, ...)`.
        image_flags: 1 for an image, 0 for a dummy, shape `(B,)`.

    Returns:
        The features of the real tiles, and a zero computed from those of the dummies. Added to the loss or to any
        embedding, it changes no value and gives every rank a backward pass through the vision tower.

    Raises:
        ConfigError: If an argument is not a tensor.
        ShapeError: If there is not one flag per tile.
    """
    for name, value in (("features", features), ("image_flags", image_flags)):
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"{name} is not a tensor.", expected="torch.Tensor", got=type(value).__name__)
    if image_flags.shape != features.shape[:1]:
        raise ShapeError(
            "image_flags has not one flag per tile.",
            expected=f"shape {tuple(features.shape[:1])}",
            got=f"shape {tuple(image_flags.shape)}",
        )
    return features[image_flags.bool()], (features[~image_flags.bool()] * 0).sum()
