"""A text encoder without a model, for tests and examples; public as `covft.testing.HashTextEncoder`."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from covft.text.base import CachedTextEncoder, check_width
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.utils.arguments import check_kinds


class HashTextEncoder(CachedTextEncoder):
    """Draws the features of a text from a generator that its hash seeds: the same in every process.

    Args:
        text_dim: Features per text, C.
        cache_bytes: Bound on the memory of the cached features.

    Example:
        >>> HashTextEncoder(8).encode(["a", "b", "a"]).shape
        torch.Size([3, 8])
    """

    @check_kinds
    def __init__(self, text_dim: int, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.text_dim = check_width(text_dim)
        super().__init__(f"hash:{text_dim}", cache_bytes=cache_bytes)

    def _encode_one(self, text: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, self.text_dim, generator=generator, dtype=torch.float32)
