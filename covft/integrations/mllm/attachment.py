"""Holds the state of an attached or tuned model, and finds the text of each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from covft.encoder import ContextEncoder
from covft.errors import MissingContextError, ShapeError, UnsupportedViTError
from covft.integrations.mllm.families import MLLMFamily, base_of
from covft.integrations.mllm.images import ImageMap, groups_of, map_images
from covft.integrations.mllm.prompt import PromptReader
from covft.integrations.mllm.texts import Texts, as_texts, assign, check_index, refuse_index, same_text
from covft.surgery.checks import check_not_copied
from covft.surgery.overrides import Override
from covft.surgery.skipping import check_read
from covft.text.inputs import as_index
from covft.tuning.tuned import TunedViT

KEY = "_covft_attachment"
Tower = ContextEncoder | TunedViT
# The text of placeholder images, whose features are dropped.
NO_IMAGE = "no image"


@dataclass(eq=False)
class Attachment:
    """Connects a multimodal LLM, its context-aware tower and the reader of its prompts.

    Attributes:
        encoder: The tower, as `covft.wrap` or `covft.tune` returned it.
        reader: Reads instructions from `input_ids`.
        family: How images reach the tower.
        overrides: What has replaced methods of the model.
        balanced: Whether the load-balancing loss of sparse routing was ever added to the model's loss.
        balancing: Whether a call is running that adds it.
        outside: Whether parameters outside the tower were trainable, by name, where `covft.tune` has changed that.
        linears: Paths of the language model's layers that `covft.tune` had peft adapt.
    """

    model: nn.Module
    encoder: Tower
    reader: PromptReader
    family: MLLMFamily
    overrides: list[Override] = field(default_factory=list)
    balanced: bool = False
    balancing: bool = False
    outside: dict[str, bool] = field(default_factory=dict)
    linears: tuple[str, ...] = ()

    @property
    def routed(self) -> ContextEncoder | None:
        """The tower, if it has experts; None if another method tunes it."""
        return self.encoder if isinstance(self.encoder, ContextEncoder) else None

    def override(self, overrides: Mapping[str, Callable[[Attachment, str], Override]]) -> None:
        """Override methods of the model, by name, and note what is installed."""
        for name, make in overrides.items():
            override = make(self, name)
            override.install()
            self.overrides.append(override)

    def covered(self) -> list[str]:
        """Return the methods that another library has replaced since they were overridden."""
        return [override.name for override in self.overrides if not override.is_installed]

    def check_uncovered(self, since: str) -> None:
        """Refuse to undo overrides that another library has replaced.

        Args:
            since: What has overridden the methods, for the message.

        Raises:
            UnsupportedViTError: If it has.
        """
        if covered := self.covered():
            raise UnsupportedViTError(
                f"Another library has replaced model.{covered[0]} since {since}.",
                expected=f"the methods that {since} put there",
                got=f"{type(self.model.__dict__.get(covered[0])).__name__} at {', '.join(covered)}",
                fix="accelerator.unwrap_model(model, keep_fp32_wrapper=False) first, if accelerate prepared it",
            )

    def remove(self) -> None:
        """Give the model its own methods back."""
        for override in reversed(self.overrides):
            override.remove()
        del self.model.__dict__[KEY]

    def check_read(self, given: Mapping[str, Any]) -> None:
        """Refuse a call that reads the hidden state of a skipped block, which is a copy of another.

        Args:
            given: Arguments of the call, by name.

        Raises:
            ConfigError: If it does.
        """
        encoder = self.encoder
        check_read(encoder.spec, encoder.feature_layer, read_layers(self.model, given))

    def conditioned(
        self, given: Mapping[str, Any], context_text: Any, context_index: Any = None
    ) -> AbstractContextManager[Any]:
        """Return a context that holds the text of a call for the tower.

        It holds nothing if the tower will not run, if it needs no text, or inside an open `encoder.condition(...)`.

        Args:
            given: Arguments of the call, by name.
            context_text: The caller's text: None, one for all, or one (a string or a row of features) per row of
                `input_ids`, per image or per tile.
            context_index: Which text each tile has, shape `(T,)`, if the batch has it: without `context_text`, the row
                of `input_ids` to read.

        Raises:
            ConfigError: If the call reads the hidden state of a skipped block.
            MissingContextError: If no text is given, and none can be read.
            ShapeError: If texts and images do not fit together.
        """
        images, videos = given.get("pixel_values"), given.get("pixel_values_videos")
        if images is None and videos is None:
            return contextlib.nullcontext()
        self.check_tower()
        self.check_read(given)
        if not self.encoder.conditioning.needs_text:
            return contextlib.nullcontext()
        scope = self.encoder.conditioning.scope()
        if context_text is None and scope is not None:
            if context_index is not None and not scope.shared:
                refuse_index()
            return contextlib.nullcontext()
        if isinstance(context_text, str):
            return self.encoder.condition(context_text)
        texts = None if context_text is None else as_texts(context_text)
        if videos is not None and (images is not None or not self.family.videos):
            return self.encoder.condition(self._one_text(given, texts))
        if context_index is not None:
            return self._by_index(given, texts, context_index)
        return self._per_image(given, texts)

    def check_tower(self) -> None:
        """Refuse to run another tower than the one that was wrapped.

        Raises:
            UnsupportedViTError: If peft runs a copy of it.
        """
        tower = getattr(base_of(self.model), self.family.tower, None)
        if tower is not None:
            check_not_copied(tower)

    @contextlib.contextmanager
    def repeatable(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Let the text that is held be for repeated images too.

        For beams and several sequences, `generate` of many releases of transformers repeats the images of each row
        before the tower runs; so does every release for Mllama.

        Args:
            given: Arguments of `generate`, by name.
        """
        scope = self.encoder.conditioning.scope()
        groups = None if scope is None or scope.num_images is None else self._groups(given)
        if scope is None or groups is None or sum(groups) != scope.num_images:
            yield
            return
        before, scope.groups = scope.groups, groups
        try:
            yield
        finally:
            scope.groups = before

    def _groups(self, given: Mapping[str, Any]) -> list[int] | None:
        """Return how many rows of the tower's batch are repeated together, in order; None if that is not known."""
        images = given.get("pixel_values")
        if images is None and given.get("pixel_values_videos") is None:
            return None
        try:
            placement = self._placement(given)
        except ShapeError:  # only a text that was given by hand comes this far
            return None
        return groups_of(self.family.layout, placement, images, rows_of(given))

    def _by_index(
        self, given: Mapping[str, Any], texts: Texts | None, context_index: Any
    ) -> AbstractContextManager[Any]:
        """Condition each tile on the text that the batch names; so are dummies, which have no placeholder."""
        num_rows = rows_of(given)
        if texts is not None:
            return self.encoder.condition(texts, check_index(context_index, len(texts), num_rows))
        row_of_tile = as_index(context_index, num_rows or 0).tolist()
        asked = sorted(set(row_of_tile))
        return self.encoder.condition(self._read(given, asked), [asked.index(row) for row in row_of_tile])

    def rows_of_tower(self, given: Mapping[str, Any]) -> tuple[Tensor, dict[int, Any]]:
        """Return the row of `input_ids` that each row of the tower's batch belongs to, and the text of these rows.

        Args:
            given: Arguments of a call, by name; `context_text` and `context_index`, if they are given, among them.

        Returns:
            Rows, shape `(T,)`, and texts by row. Texts that are given per image are those of its row's first image.

        Raises:
            MissingContextError: If the text cannot be read.
            ShapeError: If the rows are not known.
        """
        texts, index = given.get("context_text"), given.get("context_index")
        placement = None if index is not None else self._placement(given)
        if placement is None:
            rows = as_index(index, rows_of(given) or 0).cpu()
        else:
            alone = rows_of(given) in (1, None)
            rows = placement.spread([0] * len(placement.tiles) if alone else placement.require_rows())
        asked = rows.unique().tolist()
        if isinstance(texts, str) or (texts is None and not self.encoder.conditioning.needs_text):
            return rows, dict.fromkeys(asked, texts)
        if texts is None:
            return rows, dict(zip(asked, self._read(given, asked), strict=True))
        texts = as_texts(texts)
        of_tile = rows if placement is None else assign(len(texts), placement, rows_of(given))
        of_tile = range(len(rows)) if of_tile is None else of_tile.tolist()
        return rows, {row: texts[of_tile[int((rows == row).nonzero()[0])]] for row in asked}

    def _read(self, given: Mapping[str, Any], rows: Iterable[int]) -> list[str | None]:
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

    def _per_image(self, given: Mapping[str, Any], texts: Texts | None) -> AbstractContextManager[Any]:
        """Condition each image on its own text or on that of its row."""
        placement, num_rows = self._placement(given), rows_of(given)
        if texts is not None:
            return self.encoder.condition(texts, assign(len(texts), placement, num_rows))
        rows = [0] * len(placement.tiles) if num_rows in (1, None) else placement.require_rows()
        asked = sorted(set(rows))
        return self.encoder.condition(self._read(given, asked), placement.spread([asked.index(row) for row in rows]))

    def _placement(self, given: Mapping[str, Any]) -> ImageMap:
        """Map the images of a call, or the videos where it has no images."""
        base = base_of(self.model)
        videos = given.get("pixel_values") is None
        placeholder = getattr(base.config, "video_token_id", None) if videos else image_id(self.model)
        return map_images(self.family.layout, base, given, placeholder, videos=videos)

    def _one_text(self, given: Mapping[str, Any], texts: Texts | None) -> str | None:
        """Return the text of a batch with videos, whose frames can only share one."""
        if texts is None:
            texts = self._read(given, range(rows_of(given) or 0))
        return same_text(texts, rows_of(given))


def rows_of(given: Mapping[str, Any]) -> int | None:
    """Return the number of rows of `input_ids` in the arguments of a call; None without them."""
    input_ids = given.get("input_ids")
    return None if input_ids is None else len(input_ids)


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


def read_layers(model: Any, given: Mapping[str, Any] | None = None) -> Any:
    """Return the hidden state of the tower that a model reads, or several; None if its config does not say.

    Args:
        model: A multimodal LLM of transformers.
        given: Arguments of a call, by name, which may ask for another one.
    """
    for name in ("vision_feature_layer", "vision_feature_layers"):
        layers = (given or {}).get(name)
        layers = getattr(model.config, name, None) if layers is None else layers
        if layers is not None:
            return layers
    return None


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
