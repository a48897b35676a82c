"""A function from texts to features as a text encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from covft.text.base import PROBES, CachedTextEncoder
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.utils.arguments import check_kinds


class CallableTextEncoder(CachedTextEncoder):
    """Calls a function with one text at a time.

    Args:
        function: Takes `list[str]` (S of them), returns a tensor or array `(S, C)`. A module is put into eval
            mode before each call.
        text_dim: Features per text, C; by default found with one call.
        name: For saved configs; by default `callable:` and the function's name.
        cache_bytes: Bound on the memory of the cached features.

    Raises:
        TextEncoderError: If the call that finds the width fails.
        ShapeError: If it does not return `(1, C)` for one text.

    Example:
        >>> CallableTextEncoder(lambda texts: torch.ones(len(texts), 8), name="ones").text_dim
        8
    """

    _probe_fix = "covft.text.CallableTextEncoder(function, text_dim=C), if the function knows only certain texts"

    @check_kinds
    def __init__(
        self,
        function: Callable[[list[str]], Any],
        *,
        text_dim: int | None = None,
        name: str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        label = getattr(function, "__qualname__", type(function).__qualname__)
        super().__init__(name or f"callable:{label}", cache_bytes=cache_bytes)
        self.function = function
        self._modules = [function] if isinstance(function, nn.Module) else []
        self._device = torch.device("cpu")
        self.text_dim = text_dim if text_dim is not None else self._try(self._encode_one, PROBES[0]).shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the features that the function last returned."""
        return self._device

    def _encode_one(self, text: str) -> Tensor:
        features = self.function([text])
        if not isinstance(features, Tensor) and hasattr(features, "__array__"):
            features = torch.as_tensor(features)
        if isinstance(features, Tensor):
            self._device = features.device
        return features
