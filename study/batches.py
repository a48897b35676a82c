"""Questions and images as LLaVA batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from covft.data import IGNORE_INDEX
from study.data.tasks import Example
from study.data.tokenizer import prompt
from study.towers import IMAGE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Questions(Dataset):
    """Tokenises examples, once.

    Args:
        examples: The questions; `Example.scene` is a row of the tower's inputs.
        tokenizer: The study's tokenizer.
        without_question: Omit the question from the prompt.
    """

    def __init__(
        self, examples: list[Example], tokenizer: PreTrainedTokenizerFast, without_question: bool = False
    ) -> None:
        self.examples = examples
        ids = tokenizer.get_vocab()
        self.rows = [
            (
                [ids[word] for word in prompt("" if without_question else e.question, IMAGE_TOKENS).split()],
                [ids[word] for word in f"{e.answer} <eos>".split()],
            )
            for e in examples
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict:
        before, after = self.rows[position]
        return {"before": before, "after": after, "example": self.examples[position]}


@dataclass
class Collator:
    """Pads on the left, labels only the answers, and adds the tower's inputs and the questions.

    Attributes:
        inputs: Inputs of the tower, one row per scene: pixels or cached hidden states.
        pad_token_id: Id of the padding token.
        with_answers: Whether the texts include the answers, as in training, or end before them, as in generation.
    """

    inputs: torch.Tensor
    pad_token_id: int
    with_answers: bool = True

    def __call__(self, rows: list[dict]) -> dict:
        """Return `input_ids`, `attention_mask` and `labels` (B, L), `pixel_values` (B, ...) and `questions`."""
        texts = [row["before"] + (row["after"] if self.with_answers else []) for row in rows]
        longest = max(map(len, texts))
        ids = torch.full((len(rows), longest), self.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORE_INDEX)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            ids[i, longest - len(text) :] = torch.tensor(text)
            if self.with_answers:
                labels[i, longest - len(row["after"]) :] = torch.tensor(row["after"])
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.pad_token_id).long(),
            "labels": labels,
            "pixel_values": self.inputs[[row["example"].scene for row in rows]],
            "questions": [row["example"].question for row in rows],
        }
