"""Models of sentence-transformers, with the pooling and scaling that they were trained with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, freeze
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.text.loading import count_tokens, not_loaded
from covft.utils.extras import import_library


class SentenceTransformersEncoder(CachedTextEncoder):
    """A `SentenceTransformer`; the features are those of its own `encode`.

    Args:
        model: A model id, a folder, or a loaded model, which is frozen in place.
        revision: Branch, tag or commit of a model id.
        cache_bytes: Bound on the memory of the cached features.

    Raises:
        TextEncoderError: If the model cannot be loaded, or does not return dense features.
        MissingDependencyError: If sentence-transformers is not installed and an id or folder is given.
    """

    def __init__(
        self, model: str | nn.Module, *, revision: str | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        loaded: Any = model
        if isinstance(model, str):
            library = import_library("sentence_transformers", "sentence-transformers", needed_by="This text encoder")
            try:
                # On the CPU, like every other encoder that covft loads; the library itself would take a GPU.
                loaded = library.SentenceTransformer(model, revision=revision, device="cpu")
            except (OSError, ValueError, KeyError) as error:
                raise not_loaded(model, error) from error
            self._owned = loaded
        if "SentenceTransformer" not in {cls.__name__ for cls in type(loaded).__mro__}:
            raise TextEncoderError(
                "This model of sentence-transformers has no dense features per text.",
                expected="SentenceTransformer",
                got=type(loaded).__name__,
            )
        config = getattr(getattr(loaded[0], "auto_model", None), "config", None)
        saved = getattr(config, "name_or_path", None) or f"sentence_transformers:{type(loaded).__name__}"
        super().__init__(model if isinstance(model, str) else saved, cache_bytes=cache_bytes)
        self.model, self._modules = loaded, [loaded]
        self.revision = revision
        self.max_length = getattr(loaded, "max_seq_length", None)
        self.text_dim = self._probe()
        freeze([loaded])

    def _encode_one(self, text: str) -> Tensor:
        self._is_cut(count_tokens(getattr(self.model, "tokenizer", None), text))
        return self.model.encode([text], convert_to_tensor=True, show_progress_bar=False)
