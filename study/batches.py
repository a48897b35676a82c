"""Questions about pictures as LLaVA batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from study.llava import IGNORE
from study.tasks import Example
from study.towers import IMAGE_TOKENS
from study.words import prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Questions(Dataset):
    """Examples with their token ids, made once.

    Args:
        examples: The questions; `Example.scene` is a row of the pictures.
        tokenizer: The miniature's tokenizer.
        without_question: Leave the question out of the prompt.
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
    """Pads on the left, puts labels on the answer alone, and adds pictures and questions.

    Attributes:
        pictures: What the tower takes, one row per scene: pixels or cached activations.
        pad_token_id: Padding.
        with_answers: Whether the answers are part of the input (training) or not (generation).
    """

    pictures: torch.Tensor
    pad_token_id: int
    with_answers: bool = True

    def __call__(self, rows: list[dict]) -> dict:
        """A batch: `input_ids`, `attention_mask`, `labels` (B, L), `pixel_values` (B, ...), `questions`."""
        texts = [row["before"] + (row["after"] if self.with_answers else []) for row in rows]
        longest = max(map(len, texts))
        ids = torch.full((len(rows), longest), self.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORE)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            ids[i, longest - len(text) :] = torch.tensor(text)
            if self.with_answers:
                labels[i, longest - len(row["after"]) :] = torch.tensor(row["after"])
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.pad_token_id).long(),
            "labels": labels,
            "pixel_values": self.pictures[[row["example"].scene for row in rows]],
            "questions": [row["example"].question for row in rows],
        }
