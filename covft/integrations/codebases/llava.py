"""LLaVA and LLaVA-NeXT: conditions the tower on the instruction of each row, without edits to their files.

    python -m covft.integrations.codebases.llava --covft_layers 11-22 -- llava/train/train_mem.py <their flags>

Their only function that sees images and token ids, in training as in generation, is
`prepare_inputs_labels_for_multimodal`; its override reads the prompts first. `forward` gets the load-balancing loss.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.integrations.codebases.installing import Codebase, TowerAttachment
from covft.integrations.codebases.launch import Flags
from covft.integrations.mllm.attachment import NO_IMAGE, attachment_of
from covft.integrations.mllm.balance import LossOverride
from covft.integrations.mllm.overrides import MethodOverride
from covft.surgery.overrides import Override

IMAGE_TOKEN_INDEX = -200  # in their input_ids: one image, however many tokens it becomes
_PREPARE = "prepare_inputs_labels_for_multimodal"


class PrepareOverride(MethodOverride):
    """Overrides `prepare_inputs_labels_for_multimodal` and holds the text of each image for the tower."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        args = self._own(args)
        given = self._named(args, kwargs)
        attachment, images, input_ids = self.attachment, given.get("images"), given.get("input_ids")
        assert isinstance(attachment, TowerAttachment)
        # With one id per row, a token is being generated: their method does not use the images.
        if images is None or input_ids is None or input_ids.shape[1] == 1 or attachment.is_idle:
            return self.inner(*args, **kwargs)
        with attachment.encoder.condition(*texts_of_images(attachment, given)):
            return self.inner(*args, **kwargs)


class WithGradients(Override):
    """Replaces the forward of a module without its decorators, such as `torch.no_grad()` of LLaVA's towers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the undecorated method."""
        return inspect.unwrap(type(self.owner).forward)(self.owner, *args, **kwargs)


class LLaVA(Codebase):
    """Makes the tower of a `LlavaLlamaForCausalLM` or a sibling context-aware, of LLaVA or LLaVA-NeXT.

    A conversation is an entry of their `conv_templates`. The default is their `default_conversation`, which their
    training sets by `--version` or `--prompt_version`.
    """

    program = "covft.integrations.codebases.llava"
    loader = "llava.model.builder.load_pretrained_model"
    overrides: ClassVar = {_PREPARE: PrepareOverride, "forward": LossOverride}
    unread_fix = (
        "train stage 1 (plain captions) without covft, or --covft_empty_instruction 'Describe the image.' "
        "(empty_instruction= of attach)"
    )

    def find_tower(self, model: Any) -> tuple[nn.Module, int | None]:
        """Return the tower and the hidden state that the model reads."""
        if not hasattr(model, _PREPARE) or not hasattr(model, "get_vision_tower"):
            raise UnsupportedViTError(
                f"{type(model).__name__} is not a model of LLaVA's code.",
                expected=f"get_vision_tower() and {_PREPARE}()",
                got=type(model).__name__,
                fix="covft.attach(model, text_encoder, tokenizer=tokenizer), for models of transformers",
            )
        if isinstance(getattr(model.get_model(), "vision_tower", None), list):
            raise UnsupportedViTError(
                "The tower is hidden from the model, as --fsdp hides it, so it would not be trained.",
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
                expected="CLIPVisionTower, SigLipVisionTower or one that passes its images on unchanged",
                got=type(wrapper).__name__,
                fix="--s2 False",
            )
        return inner, getattr(wrapper, "select_layer", None)

    def default_conversation(self, model: Any) -> Any:
        """Return the `default_conversation` of the package llava."""
        module = sys.modules.get("llava.conversation")
        if module is None:
            raise ConfigError(
                "The conversation that writes the prompts is not known.",
                expected="conversation=, or the package llava, whose default_conversation is taken",
                fix="attach(..., conversation='vicuna_v1')",
            )
        return module.default_conversation

    def describe(self, conversation: Any) -> str:
        """Name a conversation by the flag of their training scripts."""
        templates = getattr(sys.modules.get("llava.conversation"), "conv_templates", {})
        names = [name for name, template in templates.items() if template is conversation]
        return f"{' or '.join(names)}, which --version chooses" if names else super().describe(conversation)

    def named_conversation(self, flags: Flags) -> Any:
        """Return the conversation of covft's own flag, or of their evaluation scripts' flag."""
        name = flags.theirs("conv-mode", "conv_mode")
        if flags.chat_template is not None or name is None:
            return flags.chat_template
        templates = sys.modules["llava.conversation"].conv_templates
        if name not in templates:
            raise ConfigError(f"llava does not know --conv-mode {name}.", known=", ".join(templates))
        return templates[name]

    def finish(self, model: Any) -> None:
        """Remove `torch.no_grad()` from the forward of the tower's wrapper."""
        wrapper = model.get_vision_tower()
        if hasattr(type(wrapper).forward, "__wrapped__"):  # decorated with torch.no_grad()
            attachment = attachment_of(model)
            assert attachment is not None
            attachment.override({"forward": lambda _, name: WithGradients(wrapper, name)})


def texts_of_images(attachment: TowerAttachment, given: Mapping[str, Any]) -> tuple[list[str], Tensor]:
    """Return the texts of a batch, and the index of the text for each row of the tower's batch.

    Their rule: each placeholder of a row takes the next entry of `images`. A row without placeholders takes one, too,
    and does not use it. An entry is an image or a stack of its crops or frames.

    Raises:
        ShapeError: If the rows take more or fewer images than there are.
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
    index: list[int] = []
    for row, count in enumerate(counts):
        text = attachment.read(row, given) if count else NO_IMAGE
        if text not in texts:
            texts.append(text)
        index += [texts.index(text)] * max(count, 1)
    return texts, torch.tensor(index).repeat_interleave(torch.tensor(tiles))


def _tiles(images: Tensor | Sequence[Tensor]) -> list[int]:
    """Return how many rows of the tower's batch each entry of `images` takes."""
    if isinstance(images, Tensor):
        return [images.shape[1] if images.dim() == 5 else 1] * len(images)
    return [image.shape[0] if image.dim() == 4 else 1 for image in images]


_CODEBASE = LLaVA()
attach = _CODEBASE.attach
"""Make the tower of a LLaVA model context-aware, in place; see `Codebase.attach`."""
main = _CODEBASE.main
"""Run a script of LLaVA or LLaVA-NeXT with a context-aware tower; see `Codebase.main`."""


if __name__ == "__main__":
    # Import main by name: a model must not keep classes of __main__, which their script becomes.
    from covft.integrations.codebases.launch import run as _run
    from covft.integrations.codebases.llava import main as _main

    _run(_main)
