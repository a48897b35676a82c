"""Reads samples from any iterable: images, their text, and the kind of instruction.

What one entry may be:

    (images, text)            one sample: an image (3, H, W), or its tiles (tiles, 3, H, W), and a text
    (images, text, kind)      with its kind of instruction
    (images, texts, kinds)    a batch: (B, 3, H, W), or a list of such images, and lists
    {"pixel_values": ..., "context_text": ..., ...}   a sample of a ConversationDataset, or a batch of its Collator
    {"input_ids": ..., ...}   other arguments of the model, which reads the text itself; "kind" is taken out
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from covft.data import ConversationDataset
from covft.data.checks import short
from covft.errors import ConfigError, ShapeError
from covft.utils.arguments import check_kinds, check_sizes

Data = Iterable[Any] | Dataset
"""What is read: an iterable, or a data set by index."""

# What `ConversationDataset` and `Collator` give; any other key is an argument that only the model understands.
_OF_DATA = {
    "input_ids", "labels", "attention_mask", "pixel_values", "context_text", "context_index", "image_flags",
    "num_tiles", "row", "kind",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One text with its images.

    Attributes:
        images: The images, or the tiles of one image, shape `(tiles, 3, H, W)`.
        text: The instruction, or its features, shape `(C,)`; None for no text.
        kind: Kind of instruction; None if it is not known.
        source: The sample of the data set that it was read from, with tokens and labels; empty elsewhere.
    """

    images: Tensor
    text: str | Tensor | None
    kind: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Samples that run together.

    Attributes:
        images: Images of all samples, one after another, shape `(T, 3, H, W)`; None where only the model can read them.
        texts: Text of each sample, or its features; None for no text. Empty where the model reads them itself.
        kinds: Kind of instruction of each sample; None where it is not known.
        index: Which sample each image belongs to, shape `(T,)`.
        samples: The samples; empty where only the model can read them.
        inputs: Arguments of the model, where only it can read them.
    """

    images: Tensor | None
    texts: tuple[str | Tensor | None, ...]
    kinds: tuple[str | None, ...]
    index: Tensor
    samples: tuple[Sample, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> Any:
        """The texts as the encoder takes them, one per sample; None if there are none."""
        if not self.texts or all(text is None for text in self.texts):
            return None
        if isinstance(self.texts[0], Tensor):
            return torch.stack([text for text in self.texts if isinstance(text, Tensor)])
        return list(self.texts)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.kinds)


@check_kinds
def batches(data: Data, size: int = 16) -> Iterator[Batch]:
    """Read data in batches, in order and once; samples without images are left out.

    Batches of the data are cut into samples and put together again. Images of another shape start another batch.
    Arguments that only the model understands stay one batch each.

    Args:
        data: Samples or batches, as in the overview of `covft.analysis.samples`, or a data set of such, such as a
            `ConversationDataset`.
        size: Samples per batch.

    Raises:
        ConfigError: If an entry cannot be read.
        ShapeError: If images, texts and kinds of an entry do not fit together.

    Example:
        >>> data = [(torch.rand(3, 16, 16), "What is left of the cup?", "where")] * 3
        >>> [len(batch) for batch in batches(data, size=2)]
        [2, 1]
    """
    check_sizes(size=size)
    return _batches(_entries(data), size)


def _batches(entries: Iterator[Any], size: int) -> Iterator[Batch]:
    waiting: list[Sample] = []
    for entry in entries:
        complete = isinstance(entry, Mapping) and not _is_sample(entry)
        for sample in () if complete else _samples(entry):
            if waiting and (len(waiting) == size or not _same_shape(waiting[0], sample)):
                yield _together(waiting)
                waiting = []
            waiting.append(sample)
        if complete:
            if waiting:
                yield _together(waiting)
                waiting = []
            yield arguments(entry)
    if waiting:
        yield _together(waiting)


def _entries(data: Data) -> Iterator[Any]:
    if isinstance(data, Dataset) and not hasattr(data, "__iter__") and not isinstance(data, ConversationDataset):
        data = (data[number] for number in range(len(data)))  # type: ignore[arg-type]
    if not isinstance(data, ConversationDataset):
        for entry in data:  # noqa: UP028 - `yield from` would close a generator of the caller with this one
            yield entry
        return
    for number in range(len(data)):
        sample = data[number]
        kind = data.source[sample["row"]].dataset  # of a mixture
        yield {**sample, "kind": kind or None}


def _is_sample(entry: Mapping[str, Any]) -> bool:
    """Whether a dict holds the images of each text; in other batches only the model knows whose an image is."""
    if "context_text" not in entry or not _OF_DATA.issuperset(entry):
        return False
    rows = getattr(entry.get("input_ids"), "ndim", 1) == 2
    return "context_index" in entry or not rows


def _same_shape(one: Sample, other: Sample) -> bool:
    return one.images.shape[1:] == other.images.shape[1:] and isinstance(one.text, Tensor) == isinstance(
        other.text, Tensor
    )


def _together(samples: Sequence[Sample]) -> Batch:
    tiles = torch.tensor([len(sample.images) for sample in samples])
    return Batch(
        images=torch.cat([sample.images for sample in samples]),
        texts=tuple(sample.text for sample in samples),
        kinds=tuple(sample.kind for sample in samples),
        index=torch.arange(len(samples)).repeat_interleave(tiles),
        samples=tuple(samples),
    )


def arguments(entry: Mapping[str, Any]) -> Batch:
    """Leave the arguments of a model as they are; a row of `input_ids`, or else a text, is a sample.

    Args:
        entry: The arguments, and `kind`.

    Raises:
        ConfigError: If they have neither.
    """
    inputs = {name: value for name, value in entry.items() if name != "kind"}
    texts = _listed(inputs["context_text"]) if "context_text" in inputs else ()
    rows = len(inputs["input_ids"]) if "input_ids" in inputs else len(texts)
    if not rows:
        raise ConfigError(
            "An entry of the data is not a batch of a model.",
            expected="input_ids with the images; or context_text, a text per sample",
            got=f"a dict of {short(list(entry))}",
        )
    kinds = _kinds(entry.get("kind"), rows)
    index = inputs.get("context_index")
    index = torch.arange(rows) if index is None else torch.as_tensor(index)
    return Batch(None, tuple(texts), kinds, index, inputs=inputs)


def _samples(entry: Any) -> Iterator[Sample]:
    if isinstance(entry, Mapping):
        if isinstance(entry["context_text"], str | None):
            if entry["pixel_values"] is not None:
                yield Sample(entry["pixel_values"], entry["context_text"], entry.get("kind"), entry)
            return
        yield from _of_collator(entry)
        return
    if not isinstance(entry, tuple | list) or len(entry) not in (2, 3):
        raise ConfigError(
            "An entry of the data cannot be read.",
            expected="(images, text), (images, text, kind), or a dict; see covft.analysis.samples",
            got=short(entry) if isinstance(entry, tuple | list) else type(entry).__name__,
        )
    images, text, kind = (*entry, None) if len(entry) == 2 else entry
    if _is_one(text, images):
        yield Sample(_tiles(images), text, None if kind is None else str(kind))
        return
    texts = _listed(text)
    if len(images) != len(texts):
        raise ShapeError(
            "The texts of a batch are not as many as its samples.",
            expected=f"{len(images)} texts, as there are images",
            got=f"{len(texts)}",
            fix="(list of tiles per sample, texts), where a sample has several images",
        )
    for image, own, name in zip(images, texts, _kinds(kind, len(texts)), strict=True):
        yield Sample(_tiles(image), own, name)


def _of_collator(entry: Mapping[str, Any]) -> Iterator[Sample]:
    texts, images = entry["context_text"], entry.get("pixel_values")
    kinds = _kinds(entry.get("kind"), len(texts))
    if images is None:
        return
    index = entry.get("context_index")
    index = torch.arange(len(texts)) if index is None else torch.as_tensor(index)
    if len(index) != len(images):
        raise ShapeError(
            "A batch has neither one text per image nor an index.",
            expected=f"context_index of shape ({len(images)},)",
            got=f"{len(texts)} texts" if "context_index" not in entry else f"shape {tuple(index.shape)}",
        )
    flags = entry.get("image_flags")
    real = torch.ones_like(index, dtype=torch.bool) if flags is None else torch.as_tensor(flags).bool()
    for row, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        own = images[(index == row) & real]
        if len(own):
            tokens = {key: entry[key][row] for key in ("input_ids", "labels", "attention_mask") if key in entry}
            yield Sample(own, text, kind, tokens)


def _is_one(text: Any, images: Any) -> bool:
    """Whether a text is that of one sample, and not a list of them."""
    if isinstance(text, Tensor):
        return text.dim() == 1
    return isinstance(text, str) or (text is None and isinstance(images, Tensor) and images.dim() == 3)


def _listed(text: Any) -> list[Any]:
    return [text] if isinstance(text, str) else list(text)


def _kinds(kind: Any, rows: int) -> tuple[str | None, ...]:
    if kind is None or isinstance(kind, str):
        return (kind,) * rows
    kinds = kind.tolist() if isinstance(kind, Tensor) else list(kind)
    if len(kinds) != rows:
        raise ShapeError(
            "The kinds of a batch are not as many as its samples.", expected=f"{rows} kinds", got=len(kinds)
        )
    return tuple(None if one is None else str(one) for one in kinds)


def _tiles(images: Any) -> Tensor:
    """Return the images of a sample with an axis for tiles."""
    if isinstance(images, Tensor) and images.dim() in (3, 4) and len(images):
        return images[None] if images.dim() == 3 else images
    raise ShapeError(
        "The images of a sample cannot be read.",
        expected="a tensor (3, H, W), or (tiles, 3, H, W)",
        got=tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__,
        fix="preprocess images to tensors, as the tower takes them",
    )
