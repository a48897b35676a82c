"""InternVL's internvl_chat: conditions the tower on the instruction of each row, without edits to their files.

    python -m covft.integrations.codebases.internvl -- internvl/train/internvl_chat_finetune.py <their flags>

`InternVLChatModel.forward` and `generate` see tiles and token ids together; `chat` and `batch_chat` call `generate`.
Activation checkpointing of the tower, which their training always switches on, becomes non-reentrant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.integrations.codebases.installing import Codebase, TowerAttachment
from covft.integrations.codebases.launch import Flags
from covft.integrations.codebases.patches import non_reentrant
from covft.integrations.mllm.attachment import NO_IMAGE, refuse_packed
from covft.integrations.mllm.balance import call_with_balance_loss
from covft.integrations.mllm.overrides import MethodOverride

IMAGE_CONTEXT = "<IMG_CONTEXT>"
_PACKED_FIX = "--use_packed_ds False"


class TilesOverride(MethodOverride):
    """Overrides `forward` and holds the text of each tile for the tower."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        args = self._own(args)
        given = self._named(args, kwargs)
        attachment = self.attachment
        assert isinstance(attachment, TowerAttachment)
        unread = given.get("pixel_values") is None or given.get("visual_features") is not None
        if unread or attachment.is_idle:
            return call_with_balance_loss(attachment, lambda: self.inner(*args, **kwargs), given)
        with attachment.encoder.condition(*texts_of_tiles(attachment, given)):
            return call_with_balance_loss(attachment, lambda: self.inner(*args, **kwargs), given)


class GenerateTilesOverride(TilesOverride):
    """Overrides `generate`, which runs the tower without gradients."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        # A text that is set with gradients enabled says that they are expected.
        with torch.no_grad():
            return super().__call__(*args, **kwargs)


class CheckpointingOverride(MethodOverride):
    """Overrides `extract_feature` and makes its checkpoints non-reentrant."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        with non_reentrant():
            return self.inner(*self._own(args), **kwargs)


class InternVL(Codebase):
    """Makes the tower of an `InternVLChatModel` context-aware.

    The model may come from the codebase or from a model folder with remote code. The default conversation is the
    model's own. Dummy tiles have `image_flags` of 0.
    """

    program = "covft.integrations.codebases.internvl"
    loader = "internvl.model.load_model_and_tokenizer"
    overrides: ClassVar = {
        "forward": TilesOverride,
        "generate": GenerateTilesOverride,
        "extract_feature": CheckpointingOverride,
    }
    unread_fix = "--covft_chat_template chatml (conversation= of attach)"

    def find_tower(self, model: Any) -> tuple[nn.Module, int | None]:
        """Return the tower and the hidden state that the model reads."""
        missing = [name for name in ("vision_model", "extract_feature", "num_image_token") if not hasattr(model, name)]
        if missing:
            raise UnsupportedViTError(
                f"{type(model).__name__} is not an InternVLChatModel.",
                expected="vision_model, extract_feature() and num_image_token",
                got=f"no {', '.join(missing)}",
                fix="covft.attach(model, text_encoder, tokenizer=tokenizer), for models of transformers",
            )
        if hasattr(model.vision_model, "peft_config"):
            raise UnsupportedViTError(
                "The tower contains LoRA, also in the FFNs that experts are copied from.",
                expected="the pretrained tower",
                got=type(model.vision_model).__name__,
                fix="--use_backbone_lora 0",
            )
        return model.vision_model, getattr(model, "select_layer", None)

    def default_conversation(self, model: Any) -> Any:
        """Return the model's own conversation."""
        return getattr(model, "conv_template", None)

    def describe(self, conversation: Any) -> str:
        """Name a conversation by the flag of their training scripts."""
        return f"{super().describe(conversation)}, which --conv_style chooses"

    def image_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the id of the tile placeholder."""
        return (tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),)

    def check_flags(self, flags: Flags) -> None:
        """Refuse packed data."""
        if (flags.theirs("use_packed_ds") or "false").lower() in ("true", "1", "yes"):
            raise ConfigError(
                "Packed rows hold several samples, and so several instructions.",
                expected="one sample per row",
                got="--use_packed_ds True",
                fix=_PACKED_FIX,
            )


def texts_of_tiles(attachment: TowerAttachment, given: Mapping[str, Any]) -> tuple[list[str], Tensor]:
    """Return the texts of a batch, and the index of each tile's text.

    Tiles are in the order of the rows; each real one has `num_image_token` placeholders in its row.

    Raises:
        ShapeError: If tiles and placeholders do not add up, or the rows are packed.
        MissingContextError: If a row with images has no instruction.
    """
    model: Any = attachment.model
    input_ids, flags = given["input_ids"], given.get("image_flags")
    mask = given.get("attention_mask")  # of packed rows: where samples begin
    refuse_packed(input_ids, given, _PACKED_FIX, packed=isinstance(mask, Tensor) and mask.shape != input_ids.shape)
    num_tiles = len(given["pixel_values"])
    real = [True] * num_tiles if flags is None else flags.reshape(-1).bool().tolist()
    (placeholder,) = attachment.reader.image_ids
    counts = (input_ids == placeholder).sum(dim=1).tolist()
    per_tile = model.num_image_token
    complete = not any(count % per_tile for count in counts)
    if len(real) != num_tiles or not complete or sum(counts) != per_tile * sum(real):
        raise ShapeError(
            "Tiles and their placeholders in the prompts do not add up.",
            expected=f"{per_tile} placeholders for each of {sum(real)} real tiles ({num_tiles} with dummies)",
            got=f"{counts} placeholders in the rows, {len(real)} image_flags",
            fix="--max_seq_length or --max_dynamic_patch, if rows are cut short",
        )
    tiles: list[str] = []
    for row, count in enumerate(counts):
        if count:
            tiles += [attachment.read(row, given)] * (count // per_tile)
    texts_of_real = iter(tiles)
    text_of = [next(texts_of_real) if flag else NO_IMAGE for flag in real]
    texts = list(dict.fromkeys(text_of))
    return texts, torch.tensor([texts.index(text) for text in text_of])


_CODEBASE = InternVL()
attach = _CODEBASE.attach
"""Make the tower of an `InternVLChatModel` context-aware, in place; see `Codebase.attach`."""
main = _CODEBASE.main
"""Run a script of internvl_chat with a context-aware tower; see `Codebase.main`."""


if __name__ == "__main__":
    # Import main by name: a model must not keep classes of __main__, which their script becomes.
    from covft.integrations.codebases.internvl import main as _main
    from covft.integrations.codebases.launch import run as _run

    _run(_main)
