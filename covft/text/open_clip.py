"""Text towers of open_clip models, native (the model itself carries the tower) and custom (`model.text`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, freeze
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.utils.extras import import_library

# The vocabulary of CLIP's own byte-pair tokenizer; a tower of this size was trained with it.
_CLIP_VOCABULARY = 49408
# What a native `CLIP` keeps of its text tower on the model itself; it has no `model.text`.
_NATIVE_MODULES = ("transformer", "token_embedding", "ln_final", "text_projection")
_NATIVE_PARAMETERS = ("positional_embedding", "text_projection")


class OpenCLIPTextEncoder(CachedTextEncoder):
    """The text tower of an open_clip model; the features are those of `model.encode_text`, not normalised.

    Only the text tower is frozen and put into eval mode: `model.visual` may be the ViT that is trained.

    Args:
        model: `"NAME"` or `"NAME/TAG"` of open_clip (`"ViT-L-14-336/openai"`), or a loaded model.
        tokenizer: What `open_clip.get_tokenizer` returns for the model. Needed for a loaded model whose
            vocabulary is not CLIP's.
        cache_bytes: Bound on the memory of the kept features.

    Raises:
        TextEncoderError: If the model cannot be loaded, or a tokenizer is needed.
        MissingDependencyError: If open_clip is not installed.
    """

    def __init__(
        self, model: str | nn.Module, tokenizer: Any = None, *, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self._owned = isinstance(model, str)
        loaded: Any = model
        if isinstance(model, str):
            loaded, tokenizer = _load(model, tokenizer)
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
        # CoCa says its decoder's length; its text tower may read less.
        tower = getattr(loaded, "text", loaded)
        self.max_length: int | None = getattr(tower, "context_length", getattr(loaded, "context_length", None))
        self.tokenizer = tokenizer or self._default_tokenizer()
        self._modules, self._loose = _text_tower(loaded)
        self.text_dim = self._probe()
        freeze(self._modules, self._loose)

    @property
    def device(self) -> torch.device:
        """Where the text tower is."""
        return next(parameter for module in self._modules for parameter in module.parameters()).device

    def to(self, device: torch.device | str) -> OpenCLIPTextEncoder:
        """Move a model that covft loaded; one that the caller loaded stays where the caller put it."""
        if self._owned:
            self.model.to(device)
        return self

    def _text_modules(self) -> Iterable[nn.Module]:
        return self._modules

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
        return import_library("open_clip", "open_clip", needed_by="This text encoder").SimpleTokenizer(
            context_length=self.max_length or 77
        )

    def _encode_one(self, text: str) -> Tensor:
        num_tokens = _num_tokens(self.tokenizer, text)
        if self.max_length is not None and num_tokens is not None and num_tokens > self.max_length:
            self._warn_cut(num_tokens, self.max_length)
        ids = self.tokenizer([text]).to(self.device)
        return self.model.encode_text(ids, normalize=False)


def _text_tower(model: Any) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The modules of the text tower, and its parameters that are in none of them."""
    if isinstance(getattr(model, "text", None), nn.Module):
        return [model.text], []
    modules = [getattr(model, name, None) for name in _NATIVE_MODULES]
    loose = [getattr(model, name, None) for name in _NATIVE_PARAMETERS]
    return (
        [module for module in modules if isinstance(module, nn.Module)],
        [parameter for parameter in loose if isinstance(parameter, nn.Parameter)],
    )


def _num_tokens(tokenizer: Any, text: str) -> int | None:
    """Tokens of a text before it is cut, the two end marks included; None where the tokenizer cannot tell."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "model_max_length"):
        return len(inner(text, verbose=False)["input_ids"])
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(text)) + 2
    return None


def _load(source: str, tokenizer: Any) -> tuple[Any, Any]:
    """A model and its tokenizer by `NAME` or `NAME/TAG`."""
    library = import_library("open_clip", "open_clip", needed_by="This text encoder")
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
