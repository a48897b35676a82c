"""What the tower of an attached model computes of a picture whatever is asked, kept between calls of the model."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from covft.integrations.mllm.attachment import attachment_of, read_layers, without_peft
from covft.surgery.trunk import TrunkCache


def trunk_cache(model: Any, max_bytes: int = 2**30) -> TrunkCache:
    """Return a cache that keeps what an attached model reads of its tower.

    Args:
        model: The model, also inside a PeftModel.
        max_bytes: As for `TrunkCache`.

    Raises:
        ConfigError: If the bound leaves no cache.
    """
    reads_one = isinstance(read_layers(without_peft(model)), int | None)
    return TrunkCache(max_bytes, "last" if reads_one else "all")


def kept_trunk(model: Any, cache: TrunkCache | None) -> AbstractContextManager[Any]:
    """While open, let the tower take from a cache; without one, or where the tower cannot, change nothing.

    It cannot where its first block is adapted, or where the caller has opened a cache.

    Args:
        model: An attached model.
        cache: Of `trunk_cache`, or None.
    """
    attachment = attachment_of(model)
    encoder = None if attachment is None else attachment.routed
    if cache is None or encoder is None or not encoder.has_trunk or encoder.caches_trunk:
        return contextlib.nullcontext()
    return encoder.cached_trunk(cache)
