"""The KV cache of a conversation, continued where the next prompt begins with the tokens that it holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from covft.utils.transformers_names import release

# Models of transformers, by `model_type`, whose later tokens look at all earlier ones in order, so that a cache can be
# continued with pictures. For others, and for pictures of packed towers, the conversation is computed anew.
_CONTINUED = frozenset(("internvl", "llava", "llava_next"))
_PICTURES_CONTINUE = (5, 0)  # the first release whose `generate` hands pictures on when it continues a cache
# Those whose cache can be continued with text alone: positions of a new picture, or how it is cut into tiles, depend on
# the earlier ones.
_CONTINUED_WITH_TEXT = _CONTINUED | {"llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


class Memory:
    """What a model has computed of a conversation.

    Args:
        model: The multimodal LLM without its head, which may keep offsets of positions between calls.
        image_id: The placeholder of images.
    """

    def __init__(self, model: nn.Module, image_id: int | None) -> None:
        self._model, self._image_id = model, image_id
        self.forget()

    def forget(self) -> None:
        """Drop everything."""
        self._ids: list[int] = []
        self._cache: Any = None
        self._name = ""
        self._offsets: Tensor | None = None

    def note(self, output: Any) -> None:
        """Remember what `generate` has computed.

        Args:
            output: Its output for one row, with the cache.
        """
        self._name = "cache" if "cache" in output else "past_key_values"
        self._cache = output.get(self._name)
        self._ids = output["sequences"][0].tolist()
        self._offsets = getattr(self._model, "rope_deltas", None)

    def resumed(self, ids: Tensor, *, pictures: bool) -> dict[str, Any] | None:
        """Return the arguments that continue from the cache; None if that cannot be done.

        Args:
            ids: Token ids of the complete prompt, shape `(1, L)`.
            pictures: Whether the part that is new has pictures.
        """
        kinds = _CONTINUED if pictures else _CONTINUED_WITH_TEXT
        kind = getattr(getattr(self._model, "config", None), "model_type", None)
        if self._cache is None or kind not in kinds or (pictures and release() < _PICTURES_CONTINUE):
            return None
        new = ids[0].tolist()
        held = self._cache.get_seq_length()
        same = next((i for i, (a, b) in enumerate(zip(self._ids, new, strict=False)) if a != b), len(self._ids))
        same = min(same, held, len(new) - 1)
        lost = self._image_id in self._ids[same:held] or (self._image_id in new[same:]) != pictures
        if lost or not _crop(self._cache, held - same):
            return None
        if self._offsets is not None:
            self._model.rope_deltas = self._offsets  # another conversation may have left its own
        return {self._name: self._cache}


def _crop(cache: Any, excess: int) -> bool:
    """Remove the last tokens of a cache; return whether it can be continued then."""
    if not getattr(cache, "is_croppable", True) or any(getattr(cache, "is_sliding", ())):
        return False
    if excess:
        cache.crop(-excess)
    return True
