"""Groups rows by modality and length, so that ranks neither wait for each other nor pad much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from covft.data.checks import whole
from covft.errors import ConfigError


class ModalityGroupedSampler(Sampler[int]):
    """Orders rows so that each global batch is all images or all text, with equal work per rank.

    The order consists of global batches of `world_size * batch_size` rows, rank after rank: rank r takes every
    `world_size`-th batch of `batch_size`, as accelerate distributes them. The remaining rows follow at the end, mixed.
    Within a global batch, the total lengths of two ranks differ by at most the difference between its longest and its
    shortest row.

    Args:
        lengths: Lengths of the rows, negative for rows without images (`dataset.modality_lengths()`).
        batch_size: Rows per rank and batch.
        world_size: Number of ranks.
        seed: Seed of the order; every epoch has another order.
        pool: Number of global batches whose rows are sorted by length together. 1 sorts within a global batch, as LLaVA
            does; a larger pool pads less and shuffles less.

    Raises:
        ConfigError: If a length is 0, or a setting is below 1.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, world_size: int = 1, seed: int = 0, pool: int = 1
    ) -> None:
        for name, value in (("batch_size", batch_size), ("world_size", world_size), ("pool", pool)):
            whole(value, name, least=1)
        whole(seed, "seed")
        if isinstance(lengths, (str, bytes)) or not isinstance(lengths, (Sequence, np.ndarray, torch.Tensor)):
            raise ConfigError("lengths is not a list of lengths.", expected="integers", got=type(lengths).__name__)
        lengths = [whole(length, "a length") for length in lengths]
        empty = [row for row, length in enumerate(lengths) if length == 0]
        if empty:
            raise ConfigError(
                f"{len(empty)} rows have length 0, so their modality is unknown.",
                expected="a positive length for a row with images, a negative one for a row without",
                got=f"rows {', '.join(map(str, empty[:5]))}",
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next order; the trainer calls this."""
        self.epoch = whole(epoch, "epoch", least=0)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches, rest = [], []
        for has_image in (True, False):
            rows = [row for row, length in enumerate(self.lengths) if (length > 0) is has_image]
            whole, remaining = self._global_batches(_shuffled(rows, generator))
            batches += whole
            rest += remaining
        for batch in _shuffled(batches, generator):
            yield from self._by_rank(batch)
        yield from _shuffled(rest, generator)

    def _global_batches(self, rows: list[int]) -> tuple[list[list[int]], list[int]]:
        """Form global batches, each sorted by length; return them and the remaining rows."""
        size = self.batch_size * self.world_size
        count = len(rows) // size * size
        batches = []
        for start in range(0, count, size * self.pool):
            pool = rows[start : min(start + size * self.pool, count)]
            pool.sort(key=lambda row: abs(self.lengths[row]), reverse=True)
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        return batches, rows[count:]

    def _by_rank(self, batch: list[int]) -> list[int]:
        """Distribute a sorted global batch: in every round the longest row goes to the rank with the least work."""
        shares: list[list[int]] = [[] for _ in range(self.world_size)]
        work = [0] * self.world_size
        for start in range(0, len(batch), self.world_size):
            lightest = sorted(range(self.world_size), key=lambda rank: work[rank])
            for rank, row in zip(lightest, batch[start : start + self.world_size], strict=True):
                shares[rank].append(row)
                work[rank] += abs(self.lengths[row])
        return [row for share in shares for row in share]


def _shuffled(items: list, generator: torch.Generator) -> list:
    return [items[number] for number in torch.randperm(len(items), generator=generator).tolist()]
