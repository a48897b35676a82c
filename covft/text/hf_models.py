"""Facts about the text models of transformers that their code does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import ShapeError, TextEncoderError
from covft.text.base import describe

# Trained on texts padded to full length, without a mask; the last position is the pooled token.
PADDED_TO_LIMIT = frozenset({"siglip", "siglip_text_model", "siglip2", "siglip2_text_model"})

# The model itself knows which token summarises a text, and returns it as the pooled output. The first token of a causal
# text tower (CLIP) sees only itself and must never be used.
OWN_POOLED_TOKEN = PADDED_TO_LIMIT | {"clip", "clip_text_model", "chinese_clip", "altclip", "clipseg"}

# Positions count from the padding index, and those up to it are never used.
POSITIONS_AFTER_PADDING = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"})

TokenRow = tuple[tuple[int, ...], "tuple[int, ...] | None"]


def text_part(model: Any) -> Any:
    """Return the encoder of a sequence-to-sequence model, the body of a model with a task head, else the model."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    if "For" in type(model).__name__ and not hasattr(model, "get_text_features"):
        return model.base_model
    return model


def text_config(model: Any) -> Any:
    """Return the config of the text tower."""
    return getattr(model.config, "text_config", None) or model.config


def text_modules(model: Any) -> list[nn.Module]:
    """Return the modules that a text goes through; of two towers only the text's."""
    if not hasattr(model, "get_text_features"):
        return [model]
    # Not the model itself: its vision tower may be the ViT that is trained.
    parts = [getattr(model, name, None) for name in ("text_model", "text_projection")]
    return [part for part in parts if isinstance(part, nn.Module)] or [model]


def length_limit(model: Any, tokenizer: Any) -> int | None:
    """Return how many tokens the tokenizer and the position embeddings allow; None is no limit."""
    config = text_config(model)
    limits = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    if limits[1] is not None and config.model_type in POSITIONS_AFTER_PADDING:
        limits[1] -= (config.pad_token_id or 0) + 1
    # Tokenizers without a limit have 10**30, models with relative positions -1.
    known = [limit for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(known, default=None)


def saved_name(model: Any) -> str:
    """Return the id or folder that a loaded model came from, else its class."""
    return getattr(model.config, "name_or_path", None) or f"transformers:{type(model).__name__}"


def hidden_and_pooled(output: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return hidden states `(1, L, C)` and the pooled output `(1, C)`, each None where the model has none."""
    if isinstance(output, Tensor):  # get_text_features before transformers 5
        return None, output
    pooled = getattr(output, "text_embeds", None)
    if pooled is None:
        pooled = getattr(output, "pooler_output", None)
    return getattr(output, "last_hidden_state", None), pooled


def rows_of(batch: Mapping[str, Any], *, pad_id: int | None, limit: int | None) -> list[TokenRow]:
    """Split a tokenised batch into texts without padding.

    Args:
        batch: `input_ids`, shape `(S, L)`, perhaps with `attention_mask` and `token_type_ids` of the same shape.
        pad_id: The padding id for batches without a mask; None if there is none.
        limit: Tokens that the model reads.

    Returns:
        For each text its ids, and its token types or None.

    Raises:
        ShapeError: If shapes differ, or a text is longer than the limit.
        TextEncoderError: If there are no ids, or a text is all padding.
    """
    if "input_ids" not in batch:
        got = ", ".join(map(str, batch)) or "nothing"
        raise TextEncoderError("A tokenised batch has input_ids.", expected="input_ids, attention_mask", got=got)
    ids = _matrix("input_ids", batch["input_ids"])
    types, mask = (
        None if batch.get(name) is None else _matrix(name, batch[name], like=ids)
        for name in ("token_type_ids", "attention_mask")
    )
    if mask is None:
        mask = torch.ones_like(ids) if pad_id is None else ids != pad_id
    rows: list[TokenRow] = []
    for index, kept in enumerate(mask != 0):
        row = tuple(ids[index][kept].tolist())
        if not row:
            raise TextEncoderError(
                f"Text {index} is empty: its tokens are all padding.", got=describe(ids[index].tolist())
            )
        if limit is not None and len(row) > limit:
            raise ShapeError(
                f"Text {index} has more tokens than the model reads.",
                expected=f"at most {limit}",
                got=len(row),
                fix=f"tokenizer(texts, truncation=True, max_length={limit})",
            )
        rows.append((row, None if types is None else tuple(types[index][kept].tolist())))
    return rows


def _matrix(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    try:
        matrix = torch.as_tensor(value).detach().cpu()
    except (ValueError, TypeError) as error:
        fix = "tokenizer(texts, padding=True)"
        raise ShapeError(f"{name} is not a matrix.", expected="(S, L)", got=describe(value), fix=fix) from error
    if matrix.dim() != 2 or (like is not None and matrix.shape != like.shape):
        expected = "(S, L)" if like is None else f"{tuple(like.shape)}, as input_ids"
        raise ShapeError(f"{name} does not fit.", expected=expected, got=tuple(matrix.shape))
    return matrix
