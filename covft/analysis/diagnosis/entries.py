"""Reads samples for a diagnosis: a random few of the data, each with its text and its kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from covft.analysis.samples import batches
from covft.data import ConversationDataset
from covft.errors import ConfigError, CoVFTError, ShapeError
from covft.utils.arguments import short

Kinds = Sequence[str] | Callable[[Any], str] | None


@dataclass(frozen=True)
class Entry:
    """One entry of the data.

    Attributes:
        sample: The entry itself, as the loss takes it.
        text: Its instruction, or features of it; None if it cannot be read.
        kind: Its kind of instruction; None if it is not known.
    """

    sample: Any
    text: str | Tensor | None
    kind: str | None


def read_entries(data: Iterable[Any] | Dataset[Any], kinds: Kinds, count: int, seed: int) -> list[Entry]:
    """Read entries: random ones of a data set or a sequence, the first ones of another iterable.

    Args:
        data: Entries, as in `covft.analysis.samples`; rows without images are left out.
        kinds: Kinds of instruction: one per entry, or a function of an entry; None reads them from the entries.
        count: How many, at most.
        seed: Of the choice.

    Raises:
        ConfigError: If an entry cannot be read, or only some have a kind.
        ShapeError: If there is not one kind per entry.
    """
    if isinstance(data, Mapping):
        raise ConfigError("The data are a mapping.", expected="a data set, or an iterable of entries", got=short(data))
    given = kinds if isinstance(kinds, Sequence) else None
    if given is not None and hasattr(data, "__len__") and len(given) != len(data):  # type: ignore[arg-type]
        raise ShapeError("The kinds are not as many as the entries.", expected=f"{len(data)} kinds", got=len(given))  # type: ignore[arg-type]
    found: list[Entry] = []
    for number, sample in _chosen(data, seed):
        entry = _entry(data, sample, is_optional=kinds is not None)
        if entry is None:
            continue
        if given is not None:
            if number >= len(given):
                raise ShapeError(
                    "The kinds are not as many as the entries.", expected=f"more than {number} kinds", got=len(given)
                )
            entry = replace(entry, kind=str(given[number]))
        elif callable(kinds):
            entry = replace(entry, kind=str(kinds(sample)))
        found.append(entry)
        if len(found) == count:
            break
    unknown = sum(entry.kind is None for entry in found)
    if 0 < unknown < len(found):
        raise ConfigError(
            "Some entries have a kind of instruction, and others none.",
            expected="a kind for each, or for none",
            got=f"{unknown} of {len(found)} without",
            fix="kinds=lambda entry: ...",
        )
    return found


def _chosen(data: Iterable[Any] | Dataset[Any], seed: int) -> Iterator[tuple[int, Any]]:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        yield from enumerate(data)  # type: ignore[arg-type]
        return
    for number in np.random.default_rng(seed).permutation(len(data)):  # type: ignore[arg-type]
        yield int(number), data[int(number)]  # type: ignore[index]


def _entry(data: Iterable[Any] | Dataset[Any], sample: Any, *, is_optional: bool) -> Entry | None:
    """Read one entry; None if it has no image."""
    readable = sample
    if isinstance(data, ConversationDataset):
        readable = {**sample, "kind": data.source[sample["row"]].dataset or None}
    try:
        found = list(batches([readable]))
    except CoVFTError:
        if is_optional:  # what only the loss can read
            return Entry(sample, None, None)
        raise
    if not found:
        return None
    kinds = {kind for batch in found for kind in batch.kinds}
    if len(kinds) > 1:
        raise ConfigError(
            "An entry of the data has several kinds of instruction.",
            expected="one kind per entry: a sample, or a small batch of one kind",
            got=short(sorted(map(str, kinds))),
        )
    texts = [text for batch in found for text in batch.texts]
    return Entry(sample, texts[0] if texts else None, kinds.pop())


def split(labels: Sequence[str], seed: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Split the entries of each kind into halves, by their positions: to train on, and held out."""
    draws = np.random.default_rng([1, seed])
    train: dict[str, list[int]] = {}
    held_out: dict[str, list[int]] = {}
    for kind in sorted(set(labels)):
        own = draws.permutation([number for number, label in enumerate(labels) if label == kind]).tolist()
        train[kind], held_out[kind] = own[: len(own) // 2], own[len(own) // 2 :]
    return train, held_out


def endless(numbers: Sequence[int], seed: int) -> Iterator[int]:
    """Yield numbers in a random order, again and again, each time in another."""
    draws = np.random.default_rng([2, seed])
    return itertools.chain.from_iterable(draws.permutation(numbers).tolist() for _ in itertools.count())
