"""Features that the caller brings, in the place of a text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, check_width, describe
from covft.utils.arguments import check_kinds


class PrecomputedFeatures(CachedTextEncoder):
    """Takes the place of a text encoder where every call brings features `(S, C)`.

    Args:
        text_dim: Features per text, C.

    Example:
        >>> PrecomputedFeatures(768).name
        'features:768'
    """

    @check_kinds
    def __init__(self, text_dim: int) -> None:
        self.text_dim = check_width(text_dim)
        super().__init__(f"features:{text_dim}", cache_bytes=0)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Refuse texts, since there is no model to encode them.

        Raises:
            TextEncoderError: Always.
        """
        raise TextEncoderError(
            "The ViT was wrapped for features that the caller brings, so it cannot encode texts.",
            expected=f"text features of shape (S, {self.text_dim})",
            got=describe(texts),
            fix="encoder(images, features), or wrap the ViT with a text encoder",
        )

    def _encode_one(self, text: str) -> Tensor:
        return torch.empty(1, 0)  # pragma: no cover - encode() never gets here
