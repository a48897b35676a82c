"""Resolves everything that `covft.wrap` takes as a text encoder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from covft.errors import MissingDependencyError, TextEncoderError
from covft.text.base import TextEncoder, describe, mro_modules
from covft.text.callables import CallableTextEncoder
from covft.text.hashed import HashTextEncoder
from covft.text.hf import HFTextEncoder
from covft.text.loading import find_json
from covft.text.open_clip import OpenCLIPTextEncoder
from covft.text.precomputed import PrecomputedFeatures
from covft.text.sentence_transformers import SentenceTransformersEncoder, check_modules
from covft.utils.arguments import check_kinds
from covft.utils.sources import split_options

ACCEPTED = (
    "a model id or folder; a loaded text model of transformers, sentence-transformers or open_clip, alone or "
    "as (model, tokenizer); a callable list[str] -> (S, C); an int C for features that the caller brings; "
    "or an object with name, text_dim and encode(texts)"
)


@check_kinds
def as_text_encoder(obj: Any, *, pooling: str | None = None, revision: str | None = None) -> TextEncoder:
    """Make a text encoder.

    Args:
        obj: A model id or folder (one of sentence-transformers gives that library's features), with settings if needed,
            as in `"bert-base-uncased?pooling=mean"`; `"open_clip:NAME/TAG"`; a loaded model of transformers,
            sentence-transformers or open_clip, or a pair of model and tokenizer; a callable `list[str] -> (S, C)`; an
            int C for features that the caller brings; or a `TextEncoder`, which is returned as it is.
        pooling: `"cls"`, `"mean"` or `"pooled"`, for models of transformers only. A folder of sentence-transformers is
            then loaded as a model of transformers.
        revision: Branch, tag or commit of a model id.

    Raises:
        TextEncoderError: If it is none of these, cannot be loaded, or has no choice of pooling.
        MissingDependencyError: If a library is not installed.

    Example:
        >>> as_text_encoder(768).text_dim
        768
    """
    if isinstance(obj, str | os.PathLike):
        return _from_string(os.fspath(obj), pooling, revision)
    if isinstance(obj, tuple) and len(obj) == 2 and isinstance(obj[0], nn.Module):
        return _from_module(obj[0], pooling, tokenizer=obj[1])
    if _is_text_encoder(obj):
        return _without_pooling(pooling, lambda: obj, obj)
    if isinstance(obj, int) and not isinstance(obj, bool):
        return _without_pooling(pooling, lambda: PrecomputedFeatures(obj), obj)
    if isinstance(obj, nn.Module):
        return _from_module(obj, pooling)
    if callable(obj) and not isinstance(obj, type):
        return _without_pooling(pooling, lambda: CallableTextEncoder(obj), obj)
    raise TextEncoderError("This cannot be used as a text encoder.", expected=ACCEPTED, got=describe(obj))


def _is_text_encoder(obj: Any) -> bool:
    return (
        not isinstance(obj, type)
        and isinstance(getattr(obj, "name", None), str)
        and isinstance(getattr(obj, "text_dim", None), int)
        and callable(getattr(obj, "encode", None))
    )


def _from_module(model: nn.Module, pooling: str | None, tokenizer: Any = None) -> TextEncoder:
    libraries = mro_modules(model)
    if "sentence_transformers" in libraries:
        return _without_pooling(pooling, lambda: SentenceTransformersEncoder(model), model)
    if "open_clip" in libraries:
        return _without_pooling(pooling, lambda: OpenCLIPTextEncoder(model, tokenizer), model)
    if "transformers" in libraries:
        return HFTextEncoder(model, pooling, tokenizer)
    return _without_pooling(pooling, lambda: CallableTextEncoder(model), model)


def _from_string(source: str, pooling: str | None, revision: str | None) -> TextEncoder:
    scheme, _, rest = source.partition(":")
    if scheme == "open_clip" and not rest.endswith("()"):
        return _without_pooling(pooling, lambda: OpenCLIPTextEncoder(rest), source)
    if scheme in ("features", "hash") and rest.isdecimal():
        made = PrecomputedFeatures if scheme == "features" else HashTextEncoder
        return _without_pooling(pooling, lambda: made(int(rest)), source)
    if scheme in ("callable", "transformers", "sentence_transformers", "open_clip", "local") and rest:
        raise TextEncoderError(
            f"{source!r} names a text encoder that cannot be built from its name.",
            expected="the same object that was used before",
            fix="pass it again: text_encoder=...",
        )
    source, options = split_options(source)
    revision = revision or options.get("revision")
    pooling = pooling or options.get("pooling")
    modules = check_modules(source, revision) if pooling is None else []
    if not modules:
        limit = int(options["max_length"]) if "max_length" in options else None
        normalize = options.get("normalize") == "True"
        return HFTextEncoder(source, pooling, max_length=limit, normalize=normalize, revision=revision)
    if importlib.util.find_spec("sentence_transformers") is not None:
        return SentenceTransformersEncoder(source, revision=revision)
    return _without_library(source, modules, revision)


def _without_library(source: str, modules: list[tuple[str, str]], revision: str | None) -> TextEncoder:
    """Load a sentence-transformers model without that library: the same features, or an error."""
    kinds = dict(modules)
    settings = find_json(source, f"{kinds.get('Pooling')}/config.json", revision=revision) or {}
    on = {key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True}
    modes = {"cls_token": "cls", "mean_tokens": "mean"}
    limits = find_json(source, "sentence_bert_config.json", revision=revision) or {}
    known = set(kinds) <= {"Transformer", "Pooling", "Normalize"} and not limits.get("do_lower_case")
    if not known or len(on) != 1 or not on <= set(modes):
        raise MissingDependencyError(
            f"{source} is a model of sentence-transformers, which is not installed.",
            fix='pip install "covft[sentence-transformers]"',
        )
    limit, normalize = limits.get("max_seq_length"), "Normalize" in kinds
    encoder = HFTextEncoder(source, modes[on.pop()], max_length=limit, normalize=normalize, revision=revision)
    encoder.name = source  # the same name as with that library, since the features are the same
    return encoder


def _without_pooling(pooling: str | None, make: Callable[[], Any], obj: Any) -> TextEncoder:
    if pooling is not None:
        raise TextEncoderError(
            f"pooling={pooling!r} does not apply to this text encoder, which pools by itself.",
            expected="pooling only with models of transformers",
            got=describe(obj),
        )
    return make()
