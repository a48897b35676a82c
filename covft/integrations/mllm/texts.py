"""Assigns the texts that a caller gives to the images of a batch; every text is used, or the call is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, NoReturn

from torch import Tensor

from covft.errors import ShapeError
from covft.integrations.mllm.images import ImageMap
from covft.text.inputs import as_index

Texts = Tensor | list[str | None]  # None where an image has no text


def as_texts(context_text: Any) -> Texts:
    """Return the caller's texts as a list, or his features as they are.

    Raises:
        ShapeError: If they have no order, or are tokens.
    """
    if isinstance(context_text, Tensor):
        return context_text
    if isinstance(context_text, Mapping | Set | bytes) or not isinstance(context_text, Iterable):
        raise ShapeError(
            "context_text cannot be assigned to images.",
            expected="a string, a list of strings or features of shape (S, C)",
            got=type(context_text).__name__,
            fix="context_text=['the question of row 0', ...]",
        )
    return list(context_text)


def assign(num_texts: int, placement: ImageMap, num_rows: int | None) -> Tensor | None:
    """Return which text each row of the tower's batch has; None where row i has text i.

    One text for one row is for all of its images. Otherwise there is a text per row, or per image, or per tile; the
    first that fits counts.

    Args:
        num_texts: Number of texts, S.
        placement: Images and tiles of the batch.
        num_rows: Rows of `input_ids`; None without them.

    Raises:
        ShapeError: If there is another number of texts.
    """
    num_images, num_tiles = len(placement.tiles), sum(placement.tiles)
    if num_texts == 1 and num_rows in (1, None):
        return placement.spread([0] * num_images)
    if num_texts == num_rows:
        return placement.spread(placement.require_rows())
    if num_texts == num_images:
        return placement.spread(list(range(num_images)))
    if num_texts == num_tiles:
        return None
    accepted = {"rows of input_ids": num_rows, "images": num_images, "tiles": num_tiles}
    raise ShapeError(
        "context_text does not fit the batch.",
        expected="a string for all, or as many texts as "
        + " or ".join(f"{name} ({number})" for name, number in accepted.items() if number is not None),
        got=f"{num_texts} texts",
    )


def check_index(context_index: Any, num_texts: int, num_rows: int | None) -> Tensor:
    """Return `context_index` as a tensor, shape `(T,)`.

    Rows without images have texts that no image has. Any other text must be used.

    Args:
        context_index: Which text each tile has, shape `(T,)`.
        num_texts: Number of texts, S.
        num_rows: Rows of `input_ids`; None without them.

    Raises:
        ShapeError: If it is not one whole number per tile, points at missing texts, or leaves out a text.
    """
    index = as_index(context_index, num_texts)
    unused = sorted(set(range(num_texts)) - set(index.tolist()))
    if unused and num_texts != num_rows:
        rows = "" if num_rows is None else f"{num_rows} texts, one per row of input_ids, or "
        raise ShapeError(
            "context_index leaves out a text of context_text.",
            expected=f"{rows}texts that images have",
            got=f"{num_texts} texts; no image has {', '.join(map(str, unused))}",
            fix="context_index=range(number of tiles) for a text per tile; a batch without it for a text per image",
        )
    return index


def refuse_index() -> NoReturn:
    """Refuse `context_index` without texts inside an open condition, which has an index of its own.

    Raises:
        ShapeError: Always.
    """
    raise ShapeError(
        "context_index was given inside an open condition, whose texts have their own index.",
        expected="context_index with context_text, or neither",
        got="context_index alone",
        fix="`with encoder.condition(texts, index):` around a call without context_index",
    )


def same_text(texts: Texts, num_rows: int | None) -> str | None:
    """Return the text that all rows have; None for no text.

    Args:
        texts: One text, or one per row.
        num_rows: Rows of `input_ids`; None without them.

    Raises:
        ShapeError: If they differ, or are features, or there is another number.
    """
    if isinstance(texts, Tensor) or len(set(texts)) != 1 or len(texts) not in (1, num_rows):
        raise ShapeError(
            "A batch with videos can have only one text.",
            expected="a string, one row, or the same text in all rows",
            got=f"features of shape {tuple(texts.shape)}" if isinstance(texts, Tensor) else f"{len(texts)} texts",
            fix="images and videos in separate calls, with one video per call if its frames are images, or "
            "`with encoder.condition(texts, index):` with a text per frame",
        )
    return texts[0]
