"""No text encoder at all: the caller brings features of a known width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, describe


class PrecomputedFeatures(CachedTextEncoder):
    """Stands where a text encoder would, when every call brings features (S, C).

    Args:
        text_dim: Features per text, C.

    Example:
        >>> PrecomputedFeatures(768).name
        'features:768'
    """

    def __init__(self, text_dim: int) -> None:
        if isinstance(text_dim, bool) or text_dim < 1:
            raise TextEncoderError("Text features need a width.", expected="an int >= 1", got=describe(text_dim))
        super().__init__(f"features:{text_dim}", cache_bytes=0)
        self.text_dim = int(text_dim)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Refuse: there is no model that could read a text.

        Raises:
            TextEncoderError: Always.
        """
        raise TextEncoderError(
            "There is no text encoder here: the ViT was wrapped for features that the caller brings.",
            expected=f"text features of shape (S, {self.text_dim})",
            got=describe(texts),
            fix="encoder(images, features), or wrap the ViT with a text encoder",
        )

    def _encode_one(self, text: str) -> Tensor:
        return torch.empty(1, 0)  # pragma: no cover - encode() never gets here
