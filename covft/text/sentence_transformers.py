"""Models of sentence-transformers, with the pooling and scaling that they were trained with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, freeze
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.text.loading import not_loaded
from covft.utils.extras import import_library


class SentenceTransformersEncoder(CachedTextEncoder):
    """A `SentenceTransformer`; the features are those of its own `encode`.

    Args:
        model: A model id, a folder, or a loaded model, which is frozen in place.
        revision: Branch, tag or commit of a model id.
        cache_bytes: Bound on the memory of the kept features.

    Raises:
        TextEncoderError: If the model cannot be loaded, or is of a kind without dense features.
        MissingDependencyError: If sentence-transformers is not installed and an id or folder is given.
    """

    def __init__(
        self, model: str | nn.Module, *, revision: str | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self._owned = isinstance(model, str)
        loaded: Any = model
        if isinstance(model, str):
            library = import_library("sentence_transformers", "sentence-transformers", needed_by="This text encoder")
            try:
                # On the CPU, like every other encoder that covft loads; the library itself would take a GPU.
                loaded = library.SentenceTransformer(model, revision=revision, device="cpu")
            except (OSError, ValueError, KeyError) as error:
                raise not_loaded(model, error) from error
        if "SentenceTransformer" not in {cls.__name__ for cls in type(loaded).__mro__}:
            raise TextEncoderError(
                "This model of sentence-transformers has no dense features per text.",
                expected="SentenceTransformer",
                got=type(loaded).__name__,
            )
        super().__init__(model if isinstance(model, str) else _saved_name(loaded), cache_bytes=cache_bytes)
        self.model = loaded
        self.revision = revision
        self.max_length: int | None = getattr(loaded, "max_seq_length", None)
        self.text_dim = self._probe()
        freeze([loaded])

    @property
    def device(self) -> torch.device:
        """Where the text model is."""
        return torch.device(self.model.device)

    def to(self, device: torch.device | str) -> SentenceTransformersEncoder:
        """Move a model that covft loaded; one that the caller loaded stays where the caller put it."""
        if self._owned:
            self.model.to(device)
        return self

    def _text_modules(self) -> Iterable[nn.Module]:
        return (self.model,)

    def _encode_one(self, text: str) -> Tensor:
        num_tokens = _num_tokens(self.model, text)
        if self.max_length is not None and num_tokens is not None and num_tokens > self.max_length:
            self._warn_cut(num_tokens, self.max_length)
        return self.model.encode([text], convert_to_tensor=True, show_progress_bar=False)


def _num_tokens(model: Any, text: str) -> int | None:
    """Tokens of a text before it is cut; None where the tokenizer is not one of transformers."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if not hasattr(tokenizer, "model_max_length"):
        return None
    return len(tokenizer(text, verbose=False)["input_ids"])


def _saved_name(model: Any) -> str:
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    return getattr(config, "name_or_path", None) or f"sentence_transformers:{type(model).__name__}"
