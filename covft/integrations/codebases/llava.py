"""LLaVA and LLaVA-NeXT: the tower reads the instruction of each row; none of their files is edited.

    python -m covft.integrations.codebases.llava --covft_layers 11-22 -- llava/train/train_mem.py <their flags>

Their one function that sees images and token ids, in training and in generation alike, is
`prepare_inputs_labels_for_multimodal`; on the model that is trained it is preceded by reading the prompts.
"""

from __future__ import annotations

import inspect
import sys
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
from covft.integrations.mllm.attach import unattached
from covft.integrations.mllm.overrides import Call

Model = TypeVar("Model", bound=nn.Module)
IMAGE_TOKEN_INDEX = -200  # in their input_ids: one image, however many tokens it becomes
_PREPARE = "prepare_inputs_labels_for_multimodal"


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
    """Make the tower of a LLaVA model context-aware, in place.

    `forward` and `generate` are called as before. Each image is seen in the light of its row's instruction. Images
    that stand for none, as text-only rows have them, go through the tower with a fixed text. Inside an open
    `covft.get_encoder(model).condition(...)` nothing is read.

    Args:
        model: A `LlavaLlamaForCausalLM` or a sibling, of LLaVA or LLaVA-NeXT, with its tower loaded.
        text_encoder: As for `covft.wrap`.
        tokenizer: The model's tokenizer.
        conversation: What wrote the prompts: an entry of their `conv_templates`, a name in
            `covft.data.CHAT_TEMPLATES` or a Jinja chat template. None takes their `default_conversation`, which
            their training sets by `--version` or `--prompt_version`.
        turns: Which of several user turns make the instruction: `"all"`, `"first"` or `"last"`.
        system: As for `covft.attach`.
        empty_instruction: Instruction of rows whose user says nothing; None makes such a row an error.
        pretrained: A saved tower to start from, instead of settings.
        **settings: As for `covft.wrap`: `layers`, `experts`, `routing`, ...

    Returns:
        The model itself.

    Raises:
        ConfigError: If a setting cannot work, or the conversation has no user's turns to read.
        UnsupportedViTError: If there is no tower that can be served.
        CheckpointError: If `pretrained` does not fit.

    Example:
        >>> tokenizer, model, processor, length = load_pretrained_model(folder, None, name)  # doctest: +SKIP
        >>> attach(model, tokenizer=tokenizer, pretrained=folder + "/covft")  # doctest: +SKIP
    """
    target = unattached(model)
    wrapper = _tower_of(target)
    if conversation is None:
        conversation = _default_conversation()
    reader = prompt_reader(
        tokenizer,
        conversation,
        turns=turns,
        system=system,
        empty_instruction=empty_instruction,
    )
    if reader.marks is None and empty_instruction is None:
        raise ConfigError(
            f"The instruction cannot be read from these prompts. {reader.problem}",
            expected="a conversation with turns of users",
            got=getattr(conversation, "version", conversation),
            fix="train stage 1 (plain captions) without covft, or give empty_instruction='Describe the image.'",
        )
    install(
        target,
        wrapper.vision_tower,
        text_encoder,
        reader,
        {_PREPARE: PrepareCall},
        read=getattr(wrapper, "select_layer", None),
        pretrained=pretrained,
        **settings,
    )
    if hasattr(type(wrapper).forward, "__wrapped__"):  # torch.no_grad() around it
        wrapper.__dict__["forward"] = WithGradients(wrapper)
    return model


class PrepareCall(Call):
    """`prepare_inputs_labels_for_multimodal`, with the text of every image held for the tower."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        args = self._own(args)
        given = self._named(args, kwargs)
        attachment, images, input_ids = self.attachment, given.get("images"), given.get("input_ids")
        assert isinstance(attachment, TowerAttachment)
        # With one id per row it is a token that is being generated: theirs returns without a look at the images.
        if images is None or input_ids is None or input_ids.shape[1] == 1 or attachment.is_idle:
            return self.inner(*args, **kwargs)
        with attachment.encoder.condition(*texts_of_images(attachment, given)):
            return self.inner(*args, **kwargs)


class WithGradients:
    """Stands for the forward of a module, without the decorators around it.

    Args:
        module: Whose `forward` is decorated, as LLaVA's towers by `torch.no_grad()`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it as it was written."""
        return inspect.unwrap(type(self.module).forward)(self.module, *args, **kwargs)


def texts_of_images(attachment: TowerAttachment, given: Mapping[str, Any]) -> tuple[list[str], Tensor]:
    """Texts, and which of them each row of the tower's batch has.

    Their rule: each placeholder of a row takes the next entry of `images`, and a row without any takes one, too, of
    which nothing is used. An entry is an image or a stack of its crops or frames.

    Args:
        attachment: What attach() left on the model.
        given: Arguments of their function, by name.

    Raises:
        ShapeError: If there are not as many images as the rows take.
        MissingContextError: If a row with images has no instruction.
    """
    tiles = _tiles(given["images"])
    input_ids, mask = given["input_ids"], given.get("attention_mask")
    placeholders = input_ids == IMAGE_TOKEN_INDEX
    if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
        placeholders = placeholders & mask.bool()
    counts = placeholders.sum(dim=1).tolist()
    if sum(max(count, 1) for count in counts) != len(tiles):
        raise ShapeError(
            "Images and their placeholders in the prompts do not add up.",
            expected=f"{sum(max(count, 1) for count in counts)} images: {counts} placeholders in the rows, and one "
            "image for each row without any",
            got=f"{len(tiles)} images",
            fix="--model_max_length: a row that is cut short loses placeholders, and later rows see other images",
        )
    texts: list[str] = []
    owners: list[int] = []
    for row, count in enumerate(counts):
        text = attachment.read(row, given) if count else NO_IMAGE
        if text not in texts:
            texts.append(text)
        owners += [texts.index(text)] * max(count, 1)
    return texts, torch.tensor(owners).repeat_interleave(torch.tensor(tiles))


def _tiles(images: Tensor | Sequence[Tensor]) -> list[int]:
    """How many rows of the tower's batch each entry of `images` takes."""
    if isinstance(images, Tensor):
        return [images.shape[1] if images.dim() == 5 else 1] * len(images)
    return [image.shape[0] if image.dim() == 4 else 1 for image in images]


def _tower_of(model: Any) -> Any:
    """Their wrapper of the tower, checked."""
    if not hasattr(model, _PREPARE) or not hasattr(model, "get_vision_tower"):
        raise UnsupportedViTError(
            f"{type(model).__name__} is no model of LLaVA's code.",
            expected=f"get_vision_tower() and {_PREPARE}()",
            got=type(model).__name__,
            fix="covft.attach(model, text_encoder, tokenizer=tokenizer), for models of transformers",
        )
    if isinstance(getattr(model.get_model(), "vision_tower", None), list):
        raise UnsupportedViTError(
            "The tower is hidden from the model, as --fsdp hides it, so nothing of it would be trained.",
            expected="a tower that is a module of the model",
            got="a list that holds it",
            fix="--deepspeed scripts/zero2.json or zero3.json instead of --fsdp",
        )
    wrapper = model.get_vision_tower()
    inner = getattr(wrapper, "vision_tower", None)
    if not isinstance(inner, nn.Module):
        raise UnsupportedViTError(
            "The tower is not loaded.",
            expected="a vision tower",
            got=type(wrapper).__name__,
            fix="model.get_vision_tower().load_model()",
        )
    if any("S2" in cls.__name__ for cls in type(wrapper).__mro__):
        raise UnsupportedViTError(
            "This tower cuts its images into pieces of several scales, whose order covft does not know.",
            expected="CLIPVisionTower, SigLipVisionTower or one that hands its images on as they are",
            got=type(wrapper).__name__,
            fix="--s2 False",
        )
    return wrapper


def _default_conversation() -> Any:
    module = sys.modules.get("llava.conversation")
    if module is None:
        raise ConfigError(
            "Nobody said what writes the prompts.",
            expected="conversation=, or the package llava, whose default_conversation is taken",
            fix="attach(..., conversation='vicuna_v1')",
        )
    return module.default_conversation


def _conversation(flags: Flags) -> Any:
    """By covft's own flag, by the flag of their evaluation scripts, or by what their training has set."""
    if flags.chat_template is not None:
        return flags.chat_template
    name = flags.theirs("conv-mode", "conv_mode")
    if name is None:
        return None
    templates = sys.modules["llava.conversation"].conv_templates
    if name not in templates:
        raise ConfigError(f"--conv-mode {name} is not known to llava.", known=", ".join(templates))
    return templates[name]


def _attach_by_flags(model: nn.Module, tokenizer: Any, flags: Flags, pretrained: str | Path | None) -> None:
    attach(
        model,
        flags.text_encoder_for(pretrained),
        tokenizer=tokenizer,
        conversation=_conversation(flags),
        pretrained=pretrained,
        **flags.reading,
        **flags.settings,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training or evaluation script of LLaVA or LLaVA-NeXT with a context-aware tower.

    Args:
        arguments: Those of the process by default.
    """
    launch(
        "covft.integrations.codebases.llava",
        _attach_by_flags,
        loader="llava.model.builder.load_pretrained_model",
        arguments=arguments,
    )


if __name__ == "__main__":
    # By its own name: what stays on the model must not be of classes of __main__, which their script becomes.
    from covft.integrations.codebases.llava import main as _main

    _main()
