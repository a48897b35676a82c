"""Answers that are generated, their scores, and the floors that stand beside them."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from study.batches import Collator, Questions
from study.progress import bar
from study.tasks import Example

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

    from covft import ContextEncoder


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    pictures: torch.Tensor,
    title: str,
    *,
    encoder: ContextEncoder | None = None,
    without_question: bool = False,
    batch: int = 200,
    show: bool = True,
) -> list[str]:
    """Generate the answer to every question, greedily.

    Args:
        model: LLaVA; its tower takes rows of `pictures`.
        tokenizer: The miniature's tokenizer.
        examples: The questions.
        pictures: One row per scene.
        title: Name on the progress bar.
        encoder: The wrapped tower, conditioned on the questions.
        without_question: Leave the question out of the prompt.
        batch: Questions per call of `generate`.
        show: Whether to show the bar.

    Returns:
        One answer per example, in their order.
    """
    model.eval()
    # tasks together, so that short answers do not wait for captions
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].answer.split()), examples[i].task, i))
    order.sort(key=lambda i: examples[i].task)
    questions = Questions(examples, tokenizer, without_question)
    collate = Collator(pictures, int(tokenizer.pad_token_id), with_answers=False)
    longest = max(len(e.answer.split()) for e in examples) + 1
    found = [""] * len(examples)
    with bar(title, len(examples), show) as report:
        for start in range(0, len(order), batch):
            positions = order[start : start + batch]
            inputs = collate([questions[i] for i in positions])
            asked = inputs.pop("questions")
            del inputs["labels"]
            with encoder.condition(asked) if encoder is not None else nullcontext():
                tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(positions, texts, strict=True):
                found[i] = text.strip()
            report(start + len(positions) - 1, None)
    return found


def scores(examples: list[Example], answers: list[str]) -> dict[str, float]:
    """Percentage of exactly right answers per task, and their mean over tasks as `mean`."""
    right: dict[str, list[bool]] = {}
    for example, given in zip(examples, answers, strict=True):
        right.setdefault(example.task, []).append(example.answer == given)
    table = {task: 100 * sum(hits) / len(hits) for task, hits in right.items()}
    table["mean"] = sum(table.values()) / len(table)
    return table


def most_frequent(train: list[Example], examples: list[Example], with_question: bool) -> list[str]:
    """The most frequent training answer to the same question, or to any question of the same task."""
    counts: dict[str, Counter] = {}
    for example in train:
        counts.setdefault(example.task, Counter())[example.answer] += 1
        counts.setdefault(example.question, Counter())[example.answer] += 1
    found = []
    for example in examples:
        known = counts.get(example.question) if with_question else None
        found.append((known or counts[example.task]).most_common(1)[0][0])
    return found


def better(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """The higher of two scores, task by task; its mean is the mean of those."""
    tasks = [task for task in first if task != "mean"]
    table = {task: max(first[task], second[task]) for task in tasks}
    table["mean"] = sum(table.values()) / len(table)
    return table
