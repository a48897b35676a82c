"""How a language model of the study reads questions and writes answers: its tokenizer, and the text around both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True, eq=False)
class Words:
    """A tokenizer, and the format of a row: `before`, the picture, `asked`, `answered`.

    Attributes:
        tokenizer: Of transformers.
        before: What stands in front of the picture.
        asked: What follows it; `{}` is the question.
        answered: What the model learns to write; `{}` is the answer.
    """

    tokenizer: Any
    before: str
    asked: str
    answered: str

    @cached_property
    def before_ids(self) -> list[int]:
        """The tokens in front of the picture."""
        return self._ids([self.before])[0]

    @cached_property
    def end(self) -> int:
        """The last token of every answer."""
        return self._ids([self.answered.format("")])[0][-1]

    @property
    def pad(self) -> int:
        """What fills short rows; no token reads it."""
        return self.tokenizer.pad_token_id

    def asked_ids(self, questions: Sequence[str]) -> list[list[int]]:
        """Tokenise questions; an empty one leaves only the format."""
        return self._ids([self.asked.format(question) for question in questions])

    def answered_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Tokenise answers, each with its end."""
        return self._ids([self.answered.format(answer) for answer in answers])

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of an answer."""
        return self.tokenizer.decode(ids).strip()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids


def study_words() -> Words:
    """Return the study's own words, one token each, as the small language model was pretrained."""
    from study.data.tokenizer import build_tokenizer

    return Words(build_tokenizer(), "<bos>", "<user> {} <answer>", "{} <eos>")


def chat_words(tokenizer: Any) -> Words:
    """Return the chat format of SmolLM2-Instruct, ChatML, with the picture at the start of the user's turn.

    The model was tuned on it, so it knows from the first step where the question ends and that an answer ends with
    `<|im_end|>`. The system's turn that its template puts in front is left out: it says nothing about pictures, and
    would make every row almost twice as long.

    Args:
        tokenizer: The model's tokenizer.
    """
    return Words(
        tokenizer, "<|im_start|>user\n", "{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"
    )  # fmt: skip
