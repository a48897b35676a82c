"""Text models of Hugging Face transformers: BERT and its kin, CLIP, SigLIP, T5 encoders, language models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, describe, freeze
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.text.hf_models import (
    OWN_POOLED_TOKEN,
    PADDED_TO_LIMIT,
    TokenRow,
    hidden_and_pooled,
    length_limit,
    rows_of,
    saved_name,
    text_config,
    text_modules,
    text_part,
)
from covft.text.loading import find_json, load_pretrained
from covft.utils.arguments import check_kinds
from covft.utils.foreign_code import refuse_code
from covft.utils.sources import with_options
from covft.utils.transformers_names import commit_of

POOLINGS = ("cls", "mean", "pooled")


class HFTextEncoder(CachedTextEncoder):
    """A text model of transformers and its tokenizer.

    The model is frozen in place: its text part is put into eval mode, again before every call, and its parameters take
    no gradient. If the model is trained elsewhere at the same time, pass it as a callable.

    Args:
        model: A model id, a folder, or a loaded model. Of two towers (CLIP, SigLIP) only the text tower is used and
            frozen.
        pooling: `"cls"`, the token that summarises a text ([CLS] of BERT, the paper's choice; the end of the text in
            CLIP); `"mean"` over the tokens of the text; or `"pooled"`, the model's own pooled output. By default
            `"cls"` where there is such a token, else `"mean"`.
        tokenizer: Its tokenizer; by default the one saved with the model.
        max_length: Tokens per text; by default the limit of the tokenizer and the position embeddings.
        normalize: Scale the features to length 1.
        revision: Branch, tag or commit of a model id.
        cache_bytes: Bound on the memory of the cached features.

    Raises:
        TextEncoderError: If the model cannot be loaded or cannot encode a text, or if this pooling makes all texts
            equal.
        MissingDependencyError: If transformers is not installed and an id or folder is given.
    """

    @check_kinds
    def __init__(
        self,
        model: str | nn.Module,
        pooling: str | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        *,
        normalize: bool = False,
        revision: str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        if pooling is not None and pooling not in POOLINGS:
            known = " | ".join(POOLINGS)
            raise TextEncoderError(f"pooling={pooling!r} is not known.", expected=known, got=repr(pooling))
        loaded: Any = model
        if not isinstance(model, str) and not hasattr(model, "config"):
            raise TextEncoderError(
                f"{type(model).__name__} is not a text model of transformers.",
                expected="a model id, a folder, or a loaded model with its config",
                got=describe(model),
                fix="covft.text.CallableTextEncoder(function)",
            )
        if isinstance(model, str):
            refuse_code(find_json(model, "config.json", revision=revision), model)
            loaded = load_pretrained("AutoModel", model, revision=revision)
            if getattr(loaded, "vision_model", None) is not None and hasattr(loaded, "get_text_features"):
                loaded.vision_model = None  # never used here, and often the larger half
            tokenizer = tokenizer or load_pretrained("AutoTokenizer", model, revision=revision)
        source = model if isinstance(model, str) else saved_name(model)
        super().__init__(source, cache_bytes=cache_bytes)
        self.model = text_part(loaded)
        self._owned = self.model if isinstance(model, str) else None
        self.tokenizer = tokenizer or _saved_tokenizer(loaded)
        self.normalize = normalize
        self.revision: str | None = commit_of(loaded) or revision
        self.max_length = max_length or length_limit(self.model, self.tokenizer)
        self.pooling = self._resolve(pooling)
        # The name has everything that the features depend on, so that a saved one reproduces them.
        options = {"max_length": max_length, "normalize": normalize or None, "revision": revision}
        self.name = with_options(source, {"pooling": self.pooling, **options})
        self._modules = text_modules(self.model)
        probe_ids: TokenRow = ((0, 1), None)  # ids that every vocabulary has
        self.text_dim = self._probe() if self.tokenizer is not None else len(self._try(self._encode_row, probe_ids))
        # Last, so that a model that cannot be used stays as it was.
        freeze(self._modules)

    def encode_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Encode a tokenised batch, each text by itself and without its padding.

        Args:
            batch: `input_ids` and `attention_mask`, shape `(S, L)`; without a mask the tokenizer's padding id marks
                padding. `token_type_ids` are used, other entries are ignored.

        Returns:
            Features, shape `(S, C)`, as `encode` would return them.

        Raises:
            ShapeError: If the shapes differ, or a text is longer than the model reads.
            TextEncoderError: If there are no ids, or a text is all padding.
        """
        return self._gather(rows_of(batch, pad_id=self._padding_id(), limit=self.max_length), self._encode_row)

    def _resolve(self, pooling: str | None) -> str:
        if hasattr(self.model, "get_text_features") or self.model.config.model_type in OWN_POOLED_TOKEN:
            return "mean" if pooling == "mean" else "pooled"
        if pooling is not None:
            return pooling
        return "cls" if self.tokenizer is None or self._special("cls") is not None else "mean"

    def _special(self, kind: str) -> int | None:
        return getattr(self.tokenizer, f"{kind}_token_id", None)

    def _padding_id(self) -> int | None:
        """Return the padding id for batches without a mask; None if it also ends a text, as in CLIP."""
        pad_id = self._special("pad")
        if pad_id is None:
            pad_id = getattr(text_config(self.model), "pad_token_id", None)
        return None if pad_id == self._special("eos") else pad_id

    def _encode_one(self, text: str) -> Tensor:
        if self.tokenizer is None:
            raise TextEncoderError(
                f"{self.name} has no tokenizer, so it cannot encode strings.",
                expected="a tokenizer, or a tokenised batch instead of strings",
                got=repr(text),
                fix="covft.text.HFTextEncoder(model, tokenizer=tokenizer)",
            )
        tokens = self.tokenizer(text, verbose=False)
        if self._is_cut(len(tokens["input_ids"])):
            tokens = self.tokenizer(text, truncation=True, max_length=self.max_length)
        return self._encode_row((tuple(tokens["input_ids"]), tokens.get("token_type_ids")))

    def _encode_row(self, row: TokenRow) -> Tensor:
        ids, types = list(row[0]), row[1]
        length = len(ids)
        inputs: dict[str, Tensor] = {}
        if self.model.config.model_type in PADDED_TO_LIMIT:
            pad_id = self._special("pad")
            pad_id = text_config(self.model).pad_token_id if pad_id is None else pad_id
            ids += [pad_id or 0] * ((self.max_length or length) - length)
        else:
            inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long, device=self.device)
        inputs["input_ids"] = torch.tensor([ids], device=self.device)
        run = getattr(self.model, "get_text_features", self.model.forward)
        if types is not None and _takes(run, "token_type_ids"):
            inputs["token_type_ids"] = torch.tensor([list(types)], device=self.device)
        run = getattr(self.model, "get_text_features", self.model)
        hidden, pooled = hidden_and_pooled(run(**inputs))
        features = self._pool(hidden, pooled, ids, length)
        return F.normalize(features, dim=-1) if self.normalize else features

    def _pool(self, hidden: Tensor | None, pooled: Tensor | None, ids: list[int], length: int) -> Tensor:
        source = pooled if self.pooling == "pooled" else hidden
        if source is None:
            raise TextEncoderError(
                f"{self.name} has no output for pooling={self.pooling!r}.",
                expected="a pooled output" if self.pooling == "pooled" else "last_hidden_state",
                got=type(self.model).__name__,
                fix=f"pooling={'mean' if self.pooling == 'pooled' else 'pooled'!r}",
            )
        if self.pooling == "pooled":
            return source
        if self.pooling == "mean":
            return source[:, :length].mean(dim=1)
        cls_id = self._special("cls")
        return source[:, ids.index(cls_id) if cls_id in ids else 0]


def _takes(method: Any, name: str) -> bool:
    """Return whether a method takes an argument; tokenizers of BERT's kind also serve models that know no types."""
    parameters = inspect.signature(method).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _saved_tokenizer(model: Any) -> Any:
    """Load the tokenizer saved with a loaded model; None if there is none."""
    source = getattr(model.config, "name_or_path", None)
    try:
        return load_pretrained("AutoTokenizer", source) if source else None
    except TextEncoderError:
        return None  # tokenised batches still work; a string raises and says what to pass
