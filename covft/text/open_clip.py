"""Text towers of open_clip models, native (the model itself carries the tower) and custom (`model.text`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, freeze
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.text.loading import count_tokens
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library

# Size of the vocabulary of CLIP's own byte-pair tokenizer.
_CLIP_VOCABULARY = 49408
# The parts of the text tower of a native `CLIP`, which has no `model.text`.
_NATIVE = ("transformer", "token_embedding", "ln_final", "text_projection", "positional_embedding")


class OpenCLIPTextEncoder(CachedTextEncoder):
    """The text tower of an open_clip model; the features are those of `model.encode_text`, not normalised.

    Only the text tower is frozen and put into eval mode: `model.visual` may be the ViT that is trained.

    Args:
        model: `"NAME"` or `"NAME/TAG"` of open_clip (`"ViT-L-14-336/openai"`), or a loaded model.
        tokenizer: As `open_clip.get_tokenizer` returns it; needed for a loaded model whose vocabulary is not CLIP's.
        cache_bytes: Bound on the memory of the cached features.

    Raises:
        TextEncoderError: If the model cannot be loaded, or a tokenizer is needed.
        MissingDependencyError: If open_clip is not installed.
    """

    @check_kinds
    def __init__(
        self, model: str | nn.Module, tokenizer: Any = None, *, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        loaded: Any = model
        if isinstance(model, str):
            loaded, tokenizer = _load(model, tokenizer)
            self._owned = loaded
        if not hasattr(loaded, "encode_text"):
            raise TextEncoderError(
                "This part of an open_clip model has no text tower.",
                expected="the whole model, with encode_text",
                got=type(loaded).__name__,
                fix="pass the model itself, not model.visual",
            )
        name = f"open_clip:{model}" if isinstance(model, str) else f"open_clip:{type(loaded).__name__}()"
        super().__init__(name, cache_bytes=cache_bytes)
        self.model = loaded
        # CoCa has its decoder's length; its text tower may read less.
        tower = getattr(loaded, "text", loaded)
        self.max_length = getattr(tower, "context_length", getattr(loaded, "context_length", None))
        self.tokenizer = tokenizer or self._default_tokenizer()
        self._modules, loose = _text_tower(loaded)
        self.text_dim = self._probe()
        freeze(self._modules, loose)

    def _default_tokenizer(self) -> Any:
        embedding = getattr(getattr(self.model, "text", self.model), "token_embedding", None)
        vocabulary = getattr(embedding, "num_embeddings", None)
        if vocabulary != _CLIP_VOCABULARY:
            raise TextEncoderError(
                "This open_clip model does not say which tokenizer it was trained with.",
                expected=f"CLIP's vocabulary of {_CLIP_VOCABULARY}, or a tokenizer",
                got=f"a vocabulary of {vocabulary}" if vocabulary else type(self.model).__name__,
                fix="covft.text.OpenCLIPTextEncoder(model, open_clip.get_tokenizer(NAME))",
            )
        library = import_library("open_clip", "open-clip", needed_by="This text encoder")
        return library.SimpleTokenizer(context_length=self.max_length or 77)

    def _encode_one(self, text: str) -> Tensor:
        self._is_cut(_num_tokens(self.tokenizer, text))
        return self.model.encode_text(self.tokenizer([text]).to(self.device), normalize=False)


def _text_tower(model: Any) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """Return the modules of the text tower, and its parameters outside of them."""
    if isinstance(getattr(model, "text", None), nn.Module):
        return [model.text], []
    parts = [getattr(model, name, None) for name in _NATIVE]
    return [p for p in parts if isinstance(p, nn.Module)], [p for p in parts if isinstance(p, nn.Parameter)]


def _num_tokens(tokenizer: Any, text: str) -> int | None:
    """Count the tokens of an uncut text, the two end marks included; None where the tokenizer cannot."""
    number = count_tokens(getattr(tokenizer, "tokenizer", None), text)
    return len(tokenizer.encode(text)) + 2 if number is None and hasattr(tokenizer, "encode") else number


def _load(source: str, tokenizer: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer by `NAME` or `NAME/TAG`."""
    library = import_library("open_clip", "open-clip", needed_by="This text encoder")
    name, _, tag = source.partition("/")
    try:
        model = library.create_model(name, pretrained=tag or None)
        return model, tokenizer or library.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError) as error:
        raise TextEncoderError(
            f"open_clip cannot load {source!r}.",
            expected='"NAME" or "NAME/TAG", as in open_clip.list_pretrained()',
            got=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            fix="fetch the weights where there is a network, or pass a loaded model",
        ) from error
