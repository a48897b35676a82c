"""Outputs of blocks for some images, which can be picked, repeated and joined.

Shapes: B images, T tokens of all images of a packed tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from covft.conditioning import TowerCall
from covft.errors import ShapeError, UnsupportedViTError
from covft.nn.segments import Segments


class NotKept(Tensor):
    """Stands for the output of a block of the trunk that was not kept. Whatever computes with it gets an error."""

    @staticmethod
    def __new__(cls: Any, like: Tensor, shape: Sequence[int] | None = None) -> NotKept:
        """Stand for a tensor, with its shape or another one."""
        shape = like.shape if shape is None else shape
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse any operation.

        Raises:
            UnsupportedViTError: Always.
        """
        raise UnsupportedViTError(
            "The output of a block of the trunk is read, but only that of its last block was kept.",
            expected="hidden states from the first adapted block on",
            got=f"{func} of an earlier one",
            fix="encoder.trunk(images, keep='all'), or covft.TrunkCache(keep='all')",
        )

    def __repr__(self, **_: Any) -> str:
        return f"NotKept(shape={tuple(self.shape)})"


@dataclass(frozen=True, eq=False)
class States:
    """Outputs of the blocks of a trunk, in the order in which they ran.

    Attributes:
        outputs: The path of each block, and what it returned.
        count: Number of images B.
        segments: Which tokens belong to which image in a packed tower; None elsewhere.
    """

    outputs: tuple[tuple[str, Any], ...]
    count: int
    segments: Segments | None

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(bytes_of(output) for _, output in self.outputs)

    def picked(self, index: Sequence[int]) -> States:
        """Return the states of some images, in the order of the index, which may repeat them."""
        if list(index) == list(range(self.count)):
            return self
        outputs = tuple(
            (path, tree_map_only(Tensor, lambda state: self._pick(state, index), output))
            for path, output in self.outputs
        )
        return States(outputs, len(index), picked_segments(self.segments, index))

    @staticmethod
    def joined(parts: Sequence[States]) -> States:
        """Return the states of the images of several, which ran through the same blocks."""
        if len(parts) == 1:
            return parts[0]
        outputs = []
        for (path, first), *others in zip(*(part.outputs for part in parts), strict=True):
            leaves, form = tree_flatten(first)
            rows = [leaves, *(tree_flatten(output)[0] for _, output in others)]
            axis = 0 if parts[0].segments is None else -2
            outputs.append((path, tree_unflatten([_cat(same, axis) for same in zip(*rows, strict=True)], form)))
        lengths = None
        if parts[0].segments is not None:
            lengths = Segments([n for part in parts for n in part.segments.lengths])  # type: ignore[union-attr]
        return States(tuple(outputs), sum(part.count for part in parts), lengths)

    def _pick(self, state: Tensor, index: Sequence[int]) -> Tensor:
        if self.segments is not None:
            segments = self.segments.merged(state.shape[-2])
            if segments.num_tokens != state.shape[-2]:
                raise _unknown(state, f"{segments.num_tokens} tokens")
            return _select(state, state.dim() - 2, tokens_of(segments.lengths, index))
        if state.shape[0] == 1 != self.count:
            return state
        if state.shape[0] % self.count:
            raise _unknown(state, f"a multiple of {self.count} rows")
        return _select(state, 0, tokens_of([state.shape[0] // self.count] * self.count, index))


def tokens_of(lengths: Sequence[int], index: Sequence[int]) -> Tensor:
    """Return the places of the tokens of some images, one image after another.

    Args:
        lengths: Tokens of each image.
        index: The images.
    """
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.cat([torch.arange(ends[i] - lengths[i], ends[i]) for i in index])


def picked_segments(segments: Segments | None, index: Sequence[int]) -> Segments | None:
    """Return the segments of some images."""
    return None if segments is None else Segments([segments.lengths[i] for i in index])


def picked_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], call: TowerCall, index: Sequence[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with some of its images.

    Args:
        args: Positional arguments of a tower: tensors, also in lists and dicts, and anything else.
        kwargs: Its keyword arguments.
        call: What that call tells about its images.
        index: The images.

    Raises:
        ShapeError: If it is not known which part of an argument belongs to which image.
    """
    count, axes = call.num_images or 0, call.format.image_axes

    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)({name: pick(part) for name, part in value.items()})
        if isinstance(value, list | tuple):
            sides = len(value) == count and all(isinstance(part, list | tuple) for part in value)
            return type(value)(value[i] for i in index) if sides else type(value)(pick(part) for part in value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if axes > 1 and value.dim() >= axes and value.shape[:axes].numel() == count:
            rows = value.flatten(0, axes - 1)
            return _select(rows, 0, torch.tensor(index)).unflatten(0, (len(index), *[1] * (axes - 1)))
        if len(value) == count:
            return _select(value, 0, torch.tensor(index))
        if call.segments is None:
            return value
        share, rest = divmod(len(value), call.segments.num_tokens)
        if rest or not share:
            raise _unknown(value, f"{count} images, or {call.segments.num_tokens} tokens")
        return _select(value, 0, tokens_of([share * length for length in call.segments.lengths], index))

    return tuple(pick(value) for value in args), {name: pick(value) for name, value in kwargs.items()}


def bytes_of(value: Any) -> int:
    """Return the bytes of the tensors in a value."""
    return sum(
        leaf.numel() * leaf.element_size()
        for leaf in tree_flatten(value)[0]
        if isinstance(leaf, Tensor) and not isinstance(leaf, NotKept)
    )


def _select(tensor: Tensor, axis: int, rows: Tensor) -> Tensor:
    if isinstance(tensor, NotKept):
        return NotKept(tensor, [*tensor.shape[:axis], len(rows), *tensor.shape[axis + 1 :]])
    return tensor.index_select(axis, rows.to(tensor.device))


def _cat(parts: Sequence[Any], axis: int) -> Any:
    first = parts[0]
    if isinstance(first, NotKept):
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return NotKept(first, shape)
    return torch.cat(list(parts), axis) if isinstance(first, Tensor) else first


def _unknown(tensor: Tensor, expected: str) -> ShapeError:
    return ShapeError(
        "It is not known which part of a tensor belongs to which image, so they cannot be repeated for several texts.",
        expected=expected,
        got=f"shape {tuple(tensor.shape)}",
        fix="encoder(trunk=trunk, text=texts) with one text per image, in the order of the call of trunk()",
    )
