"""InternVL's internvl_chat: the tower reads the instruction of each row; none of their files is edited.

    python -m covft.integrations.codebases.internvl -- internvl/train/internvl_chat_finetune.py <their flags>

`InternVLChatModel.forward` and `generate` see tiles and token ids together; `chat` and `batch_chat` call `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from covft.config import Settings
from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.integrations.codebases.conversations import prompt_reader
from covft.integrations.codebases.installing import NO_IMAGE, TowerAttachment, install
from covft.integrations.codebases.launch import Flags, launch
from covft.integrations.codebases.patches import non_reentrant
from covft.integrations.mllm.attach import unattached
from covft.integrations.mllm.attachment import starts_again
from covft.integrations.mllm.overrides import Call

Model = TypeVar("Model", bound=nn.Module)
IMAGE_CONTEXT = "<IMG_CONTEXT>"
_PACKED_FIX = "--use_packed_ds False"


def attach(
    model: Model,
    text_encoder: Any = None,
    *,
    tokenizer: Any,
    conversation: Any = None,
    turns: str = "all",
    system: str | None = None,
    empty_instruction: str | None = None,
    pretrained: str | Path | None = None,
    **settings: Unpack[Settings],
) -> Model:
    """Make the tower of an `InternVLChatModel` context-aware, in place.

    `forward`, `generate`, `chat` and `batch_chat` are called as before. Each tile is seen in the light of its row's
    instruction; dummy tiles (`image_flags` of 0) go through the tower with a fixed text. Inside an open
    `covft.get_encoder(model).condition(...)` nothing is read. Activation checkpointing of the tower, which their
    training always switches on, becomes non-reentrant.

    Args:
        model: An `InternVLChatModel`, of their repository or of a model folder with remote code.
        text_encoder: As for `covft.wrap`.
        tokenizer: The model's tokenizer.
        conversation: What wrote the prompts: a conversation object of theirs, a name in
            `covft.data.CHAT_TEMPLATES` or a Jinja chat template; None takes the model's own.
        turns: Which of several user turns make the instruction: `"all"`, `"first"` or `"last"`.
        system: As for `covft.attach`.
        empty_instruction: Instruction of rows whose user says nothing; None makes such a row an error.
        pretrained: A saved tower to start from, instead of settings.
        **settings: As for `covft.wrap`: `layers`, `experts`, `routing`, ...

    Returns:
        The model itself.

    Raises:
        ConfigError: If a setting cannot work, or the conversation has no user's turns to read.
        UnsupportedViTError: If it is no such model, or its tower has LoRA in it.
        CheckpointError: If `pretrained` does not fit.

    Example:
        >>> attach(model, tokenizer=tokenizer, pretrained=folder + "/covft")  # doctest: +SKIP
        >>> model.chat(tokenizer, pixel_values, "What is left of the cup?", generation)  # doctest: +SKIP
    """
    target = unattached(model)
    _check(target)
    if conversation is None:
        conversation = getattr(target, "conv_template", None)
    placeholder = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    reader = prompt_reader(
        tokenizer,
        conversation,
        (placeholder,),
        turns=turns,
        system=system,
        empty_instruction=empty_instruction,
    )
    if reader.marks is None and empty_instruction is None:
        raise ConfigError(
            f"The instruction cannot be read from these prompts. {reader.problem}",
            expected="a conversation with turns of users",
            got=getattr(conversation, "name", conversation),
            fix="attach(..., conversation='chatml')",
        )
    install(
        target,
        target.vision_model,
        text_encoder,
        reader,
        {"forward": TilesCall, "generate": GenerateCall, "extract_feature": FeatureCall},
        read=getattr(target, "select_layer", None),
        pretrained=pretrained,
        **settings,
    )
    return model


class TilesCall(Call):
    """`forward`, with the text of every tile held for the tower."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        args = self._own(args)
        given = self._named(args, kwargs)
        attachment = self.attachment
        assert isinstance(attachment, TowerAttachment)
        unread = given.get("pixel_values") is None or given.get("visual_features") is not None
        if unread or attachment.is_idle:
            return self.inner(*args, **kwargs)
        with attachment.encoder.condition(*texts_of_tiles(attachment, given)):
            return self.inner(*args, **kwargs)


class GenerateCall(TilesCall):
    """`generate`, which runs the tower without gradients."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        # A text given with gradients on says that they are expected.
        with torch.no_grad():
            return super().__call__(*args, **kwargs)


class FeatureCall(Call):
    """`extract_feature`, whose checkpoints are non-reentrant."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        with non_reentrant():
            return self.inner(*self._own(args), **kwargs)


def texts_of_tiles(attachment: TowerAttachment, given: Mapping[str, Any]) -> tuple[list[str], Tensor]:
    """Texts, and which of them each tile has.

    Tiles are in the order of the rows; each real one has `num_image_token` placeholders in its row.

    Args:
        attachment: What attach() left on the model.
        given: Arguments of `forward` or `generate`, by name.

    Raises:
        ShapeError: If tiles and placeholders do not add up, or the rows are packed.
        MissingContextError: If a row with images has no instruction.
    """
    model: Any = attachment.model
    input_ids, flags = given["input_ids"], given.get("image_flags")
    _refuse_packed(given)
    num_tiles = len(given["pixel_values"])
    real = [True] * num_tiles if flags is None else flags.reshape(-1).bool().tolist()
    (placeholder,) = attachment.reader.image_ids
    counts = (input_ids == placeholder).sum(dim=1).tolist()
    per_tile = model.num_image_token
    whole = not any(count % per_tile for count in counts)
    if len(real) != num_tiles or not whole or sum(counts) != per_tile * sum(real):
        raise ShapeError(
            "Tiles and their placeholders in the prompts do not add up.",
            expected=f"{per_tile} placeholders for each of {sum(real)} real tiles ({num_tiles} with dummies)",
            got=f"{counts} placeholders in the rows, {len(real)} image_flags",
            fix="--max_seq_length or --max_dynamic_patch, if rows are cut short",
        )
    texts: list[str] = []
    tiles: list[str] = []
    for row, count in enumerate(counts):
        if count:
            tiles += [attachment.read(row, given)] * (count // per_tile)
    owners = iter(tiles)
    owner_of = [next(owners) if flag else NO_IMAGE for flag in real]
    texts = list(dict.fromkeys(owner_of))
    return texts, torch.tensor([texts.index(text) for text in owner_of])


def _refuse_packed(given: Mapping[str, Any]) -> None:
    """Refuse rows that hold several samples, whose questions would become one."""
    input_ids, mask = given["input_ids"], given.get("attention_mask")
    # Packed, their attention_mask says where samples begin, and is no mask.
    packed = (isinstance(mask, Tensor) and mask.shape != input_ids.shape) or starts_again(input_ids, given)
    if packed:
        raise ShapeError(
            "The rows of input_ids are packed from several samples, so the prompt has several instructions.",
            expected="one sample per row",
            got="a packed batch",
            fix=_PACKED_FIX,
        )


def _check(model: Any) -> None:
    missing = [name for name in ("vision_model", "extract_feature", "num_image_token") if not hasattr(model, name)]
    if missing:
        raise UnsupportedViTError(
            f"{type(model).__name__} is no InternVLChatModel.",
            expected="vision_model, extract_feature() and num_image_token",
            got=f"no {', '.join(missing)}",
            fix="covft.attach(model, text_encoder, tokenizer=tokenizer), for models of transformers",
        )
    if hasattr(model.vision_model, "peft_config"):
        raise UnsupportedViTError(
            "The tower has LoRA in it, also in the FFNs that experts are copied from.",
            expected="the tower as it was pretrained",
            got=type(model.vision_model).__name__,
            fix="--use_backbone_lora 0",
        )


def _check_flags(flags: Flags) -> None:
    if (flags.theirs("use_packed_ds") or "false").lower() in ("true", "1", "yes"):
        raise ConfigError(
            "Packed rows hold several samples, and so several instructions.",
            expected="one sample per row",
            got="--use_packed_ds True",
            fix=_PACKED_FIX,
        )


def _attach_by_flags(model: nn.Module, tokenizer: Any, flags: Flags, pretrained: str | Path | None) -> None:
    attach(
        model,
        flags.text_encoder_for(pretrained),
        tokenizer=tokenizer,
        conversation=flags.chat_template,
        pretrained=pretrained,
        **flags.reading,
        **flags.settings,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training or evaluation script of internvl_chat with a context-aware tower.

    Args:
        arguments: Those of the process by default.
    """
    launch(
        "covft.integrations.codebases.internvl",
        _attach_by_flags,
        loader="internvl.model.load_model_and_tokenizer",
        arguments=arguments,
        check=_check_flags,
    )


if __name__ == "__main__":
    # By its own name: what stays on the model must not be of classes of __main__, which their script becomes.
    from covft.integrations.codebases.internvl import main as _main

    _main()
