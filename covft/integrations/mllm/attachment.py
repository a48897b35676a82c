"""Holds the state of an attached model, and finds the text of each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covft.encoder import ContextEncoder
from covft.errors import MissingContextError, ShapeError
from covft.integrations.mllm.families import MLLMFamily, base_of
from covft.integrations.mllm.images import map_images
from covft.integrations.mllm.prompt import PromptReader
from covft.surgery.checks import check_not_copied

KEY = "_covft_attachment"
# The text of placeholder images, whose features are dropped.
NO_IMAGE = "no image"


@dataclass(eq=False)
class Attachment:
    """Connects a multimodal LLM, its context-aware tower and the reader of its prompts.

    Attributes:
        encoder: The wrapped tower.
        reader: Reads instructions from `input_ids`.
        family: How images reach the tower.
        saved_in: The folder that holds the tower's present weights; None if they changed since the last save.
        balanced: Whether the load-balancing loss of sparse routing was ever added to the model's loss.
        balancing: Whether a call is running that adds it.
    """

    model: nn.Module
    encoder: ContextEncoder
    reader: PromptReader
    family: MLLMFamily
    saved_in: Path | None = None
    balanced: bool = False
    balancing: bool = False

    def conditioned(
        self, given: Mapping[str, Any], context_text: Any, context_index: Any = None
    ) -> AbstractContextManager[Any]:
        """Return a context that holds the text of a call for the tower.

        It holds nothing if the tower will not run, if it needs no text, or inside an open `encoder.condition(...)`.

        Args:
            given: Arguments of the call, by name.
            context_text: The caller's text: None, one for all, or one (a string or a row of features) per row of
                `input_ids`, per image or per tile.
            context_index: The row of `input_ids` of each tile, shape `(T,)`, if the batch has it.

        Raises:
            MissingContextError: If no text is given, and none can be read.
            ShapeError: If texts and images do not fit together.
        """
        images, videos = given.get("pixel_values"), given.get("pixel_values_videos")
        if (images is None and videos is None) or not self.encoder.conditioning.needs_text:
            return contextlib.nullcontext()
        self.check_tower()
        if context_text is None and self.encoder.conditioning.scope() is not None:
            return contextlib.nullcontext()
        if isinstance(context_text, str):
            return self.encoder.condition(context_text)
        if videos is not None and (images is not None or not self.family.videos):
            return self.encoder.condition(self._one_text(given, context_text))
        if context_index is not None:
            return self._by_row(given, context_text, torch.as_tensor(context_index).tolist())
        return self._repeatable(self._per_image(given, context_text), images)

    def check_tower(self) -> None:
        """Refuse to run another tower than the one that was wrapped.

        Raises:
            UnsupportedViTError: If peft runs a copy of it.
        """
        tower = getattr(base_of(self.model), self.family.tower, None)
        if tower is not None:
            check_not_copied(tower)

    @contextlib.contextmanager
    def _repeatable(self, condition: AbstractContextManager[Any], images: Any) -> Iterator[None]:
        """Let a condition hold for repeated rows, if the tower runs after `generate` has repeated them."""
        with condition:
            scope = self.encoder.conditioning.scope()
            if self.family.layout == "rows" and scope is not None:
                scope.per_row = images.shape[1]
            yield

    def _by_row(
        self, given: Mapping[str, Any], context_text: Any, row_of_tile: list[int]
    ) -> AbstractContextManager[Any]:
        """Condition each tile on the text of its row; so are dummies, which have no placeholder."""
        if context_text is not None:
            texts = context_text if isinstance(context_text, Tensor) else list(context_text)
            return self.encoder.condition(texts, row_of_tile)
        asked = sorted(set(row_of_tile))
        return self.encoder.condition(self._read(given, asked), [asked.index(row) for row in row_of_tile])

    def _read(self, given: Mapping[str, Any], rows: list[int]) -> list[str]:
        """Read the instructions of some rows from the prompt."""
        input_ids = given.get("input_ids")
        if input_ids is None:
            raise MissingContextError(
                "There is no prompt to read the instruction from.",
                expected="input_ids, or context_text",
                got="neither",
                fix="context_text=['the question', ...]",
            )
        packed = given.get("cu_seq_lens_q") is not None
        refuse_packed(input_ids, given, "context_text=[one text per image]", packed=packed)
        return self.reader.read(input_ids, rows, attention_mask=given.get("attention_mask"), labels=given.get("labels"))

    def _per_image(self, given: Mapping[str, Any], context_text: Any) -> AbstractContextManager[Any]:
        """Condition each image on its own text or on that of its row."""
        base = base_of(self.model)
        videos = given.get("pixel_values") is None
        placeholder = getattr(base.config, "video_token_id", None) if videos else image_id(self.model)
        placement = map_images(self.family.layout, base, given, placeholder, videos=videos)
        input_ids = given.get("input_ids")
        if context_text is None:
            one_row = input_ids is None or len(input_ids) == 1
            rows = [0] * len(placement.tiles) if one_row else placement.require_rows()
            asked = sorted(set(rows))
            return self.encoder.condition(
                self._read(given, asked), placement.spread([asked.index(row) for row in rows])
            )
        texts = context_text if isinstance(context_text, Tensor) else list(context_text)
        num_texts, num_images, num_tiles = len(texts), len(placement.tiles), sum(placement.tiles)
        num_rows = None if input_ids is None else len(input_ids)
        if num_texts == 1 and num_rows in (1, None):
            index = placement.spread([0] * num_images)
        elif num_texts == num_rows:
            index = placement.spread(placement.require_rows())
        elif num_texts == num_images:
            index = placement.spread(list(range(num_images)))
        elif num_texts == num_tiles:
            index = None
        else:
            raise ShapeError(
                "context_text does not fit the batch.",
                expected=f"one text for all, or {num_images} for the images"
                + ("" if num_rows is None else f", or {num_rows} for the rows of input_ids"),
                got=num_texts,
            )
        return self.encoder.condition(texts, index)

    def _one_text(self, given: Mapping[str, Any], context_text: Any) -> str:
        """Return the text of a batch with videos, whose frames can only share one."""
        input_ids = given.get("input_ids")
        if context_text is not None and not isinstance(context_text, Tensor):
            texts = list(context_text)
        elif context_text is None and input_ids is not None:
            mask, labels = given.get("attention_mask"), given.get("labels")
            texts = self.reader.read(input_ids, range(len(input_ids)), attention_mask=mask, labels=labels)
        else:
            texts = []
        if len(set(texts)) != 1:
            raise ShapeError(
                "A batch with videos can have only one text.",
                expected="one row, or the same text in all rows",
                got=f"{len(set(texts))} texts",
                fix="images and videos in separate calls, with one video per call if its frames are images, or "
                "`with encoder.condition(texts, index):` with a text per frame",
            )
        return texts[0]


def refuse_packed(input_ids: Tensor, given: Mapping[str, Any], fix: str, *, packed: bool) -> None:
    """Refuse rows that hold several samples, whose questions would become one.

    Args:
        input_ids: Shape `(R, L)`.
        given: Arguments of the call, by name: `position_ids`, `attention_mask`.
        fix: What the user can do.
        packed: Whether another argument already says so.

    Raises:
        ShapeError: If rows are packed: one of them has several starting positions.
    """
    if packed or _restarts(input_ids, given):
        raise ShapeError(
            "The rows of input_ids are packed from several samples, so the prompt has several instructions.",
            expected="one sample per row",
            got="a packed batch",
            fix=fix,
        )


def _restarts(input_ids: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether the positions of a row start more than once."""
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # of the text; then come time, height and width
    if not isinstance(positions, Tensor) or positions.shape != input_ids.shape:
        return False
    starts = positions == 0
    if isinstance(mask, Tensor) and mask.shape == starts.shape:
        starts = starts & mask.bool()
    return bool((starts.sum(dim=1) > 1).any())


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, also inside a PeftModel; None if it is not attached."""
    return without_peft(model).__dict__.get(KEY)


def without_peft(model: nn.Module) -> Any:
    """Return the model inside a PeftModel; any other model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def image_id(model: Any) -> int | None:
    """Return the id of a model's image placeholder, or None."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None
