"""Turns of a conversation as inputs of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from covft.data.chat_template import reads_image_parts
from covft.data.decoding import ImageDecoder
from covft.data.files import check_not_url, read_regular
from covft.errors import ConfigError


@dataclass(frozen=True)
class Turn:
    """A question, with the pictures that stand before it, and its answer.

    Attributes:
        question: What the user asks.
        images: Pictures of PIL.
        answer: What the model said; None before it did.
    """

    question: str
    images: tuple[Any, ...] = ()
    answer: str | None = None


class Prompts:
    """Writes turns as the chat template does, and makes them inputs of a model.

    Args:
        processor: The model's processor, with a chat template of its own or in its tokenizer.

    Raises:
        ConfigError: If it has no image processor or no chat template, or does not know how many tokens a picture has.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        if self.tokenizer is None or getattr(processor, "image_processor", None) is None:
            raise ConfigError(
                "A chat needs the model's processor, which makes tensors of pictures.",
                expected="a processor of transformers, with a tokenizer and an image processor",
                got=type(processor).__name__,
                fix="covft.Chat(model, AutoProcessor.from_pretrained(folder))",
            )
        if getattr(processor, "patch_size", 0) is None:  # a LLaVA's, loaded from parts that were saved apart
            raise ConfigError(
                "The processor does not know how many tokens a picture has.",
                expected="a processor with patch_size",
                got="patch_size=None",
                fix="covft.integrations.llava_processor(model, processor.tokenizer, processor.image_processor)",
            )
        self._by_parts = reads_image_parts(processor)
        self._template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if not self._template:
            raise ConfigError(
                "The processor has no chat template.",
                expected="processor.chat_template, or that of its tokenizer",
                got="none",
                fix="processor.chat_template = covft.integrations.CHAT_TEMPLATES[...]",
            )

    def inputs(self, turns: Sequence[Turn]) -> dict[str, Any]:
        """Return the inputs of a conversation that ends with a question: token ids, masks and pictures.

        Args:
            turns: The turns, the last without an answer.
        """
        messages: list[dict[str, Any]] = []
        for turn in turns:
            messages.append({"role": "user", "content": self._asked(turn)})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": self._said(turn.answer)})
        options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt"}
        if self._by_parts:
            made = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
            return dict(made)
        prompt = self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        images = [image for turn in turns for image in turn.images]
        made = self.processor(images=images or None, text=prompt, add_special_tokens=False, return_tensors="pt")
        return dict(made)

    def decode(self, ids: torch.Tensor) -> str:
        """Return the text of an answer."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _asked(self, turn: Turn) -> Any:
        if not self._by_parts:
            return "\n".join([self.processor.image_token] * len(turn.images) + [turn.question])
        images = [{"type": "image", "image": image} for image in turn.images]
        return [*images, {"type": "text", "text": turn.question}]

    def _said(self, answer: str) -> Any:
        return [{"type": "text", "text": answer}] if self._by_parts else answer


def as_images(image: Any) -> tuple[Any, ...]:
    """Return pictures of PIL from one picture, its path, or a list of such.

    Raises:
        ConfigError: If it is of another kind.
        DataError: If a file is missing, or not an image.
    """
    if image is None:
        return ()
    if isinstance(image, list | tuple):
        return tuple(one for part in image for one in as_images(part))
    if isinstance(image, str | os.PathLike):
        check_not_url(str(image), "The image")
        decoder = ImageDecoder()
        return (decoder(read_regular(Path(image), "The image", decoder.max_bytes), str(image)),)
    if not hasattr(image, "convert"):
        raise ConfigError(
            "This is not a picture.", expected="a picture of PIL, or the path of a file", got=type(image).__name__
        )
    return (image.convert("RGB"),)
