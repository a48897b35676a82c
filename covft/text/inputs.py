"""Checks of the text features and the index that a caller brings.

Shapes: B images, S texts, C text_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import ShapeError, TextEncoderError


def check_text_features(features: Tensor, text_dim: int | None) -> None:
    """Refuse a tensor that is not text features of shape `(S, C)`; any C passes if it is None.

    Values are read only on the CPU: on an accelerator that would make every call wait for it.
    """
    if features.dim() != 2 or (text_dim is not None and features.shape[1] != text_dim):
        raise ShapeError(
            "These are not text features for this encoder.",
            expected=f"shape (S, {text_dim})",
            got=tuple(features.shape),
            fix="encoder.encode_text(texts)",
        )
    if not features.is_floating_point():
        raise ShapeError(
            "Text features are floating-point numbers.",
            expected="float32, bfloat16, ...",
            got=features.dtype,
            fix="pass token ids as a tokenised batch: {'input_ids': ..., 'attention_mask': ...}",
        )
    if features.layout != torch.strided:
        raise ShapeError(
            "Text features are dense.", expected="a dense tensor", got=features.layout, fix="features.to_dense()"
        )
    readable = type(features) in (Tensor, nn.Parameter) and features.device.type == "cpu"  # fake tensors are not
    if readable and not torch.compiler.is_compiling():
        _check_finite(features.detach())


def _check_finite(features: Tensor) -> None:
    # One number per text: not finite if an entry is not, or if the entries are too large for a LayerNorm in float32.
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    sums = wide.square().sum(dim=1).float()
    try:
        finite = bool(torch.isfinite(sums.sum()))
    except RuntimeError:  # under torch.func.vmap a value cannot be read
        return
    if finite:
        return
    bad = (~torch.isfinite(sums)).nonzero().flatten().tolist() or [int(sums.argmax())]
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    raise TextEncoderError(
        "Text features are not finite, or too large for their norm.",
        expected="finite numbers, up to about 1e+18",
        got=f"rows {shown} are not",
        fix="compute the features in float32 or bfloat16",
    )


def check_index_has_text(index: Any, text: Any) -> None:
    """Refuse an index without texts that it could point at.

    Raises:
        ShapeError: If there is one.
    """
    if text is None and index is not None:
        raise ShapeError("index= was given without text.", expected="text= with index=", got="text=None")


def as_index(index: Any, num_texts: int) -> Tensor:
    """Return which text each image has, shape `(B,)`, int64.

    Raises:
        ShapeError: If it is not one whole number per image, or points at missing texts.
    """
    try:
        index = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(index).__name__}: {error}".partition("\n")[0]
        raise ShapeError("index= says which text each image has.", expected="whole numbers", got=got) from error
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ShapeError(
            "index= says which text each image has.",
            expected="whole numbers of shape (B,)",
            got=f"{index.dtype} of shape {tuple(index.shape)}",
        )
    if not torch.compiler.is_compiling() and index.numel():
        lowest, highest = int(index.min()), int(index.max())
        if lowest < 0 or highest >= num_texts:
            raise ShapeError(
                "index= points at texts that are not there.",
                expected=f"values in [0, {num_texts - 1}]  ({num_texts} texts)",
                got=f"values in [{lowest}, {highest}]",
            )
    return index.long()
