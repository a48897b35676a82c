"""Generated answers, their scores and the baselines."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from study.batches import Collator, Questions
from study.data.tasks import Example
from study.progress import progress_bar

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

    from covft import ContextEncoder


@torch.no_grad()
def generate_answers(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    inputs: torch.Tensor,
    title: str,
    *,
    encoder: ContextEncoder | None = None,
    without_question: bool = False,
    batch: int = 200,
    show: bool = True,
) -> list[str]:
    """Generate an answer to every question, greedily.

    Args:
        model: LLaVA.
        tokenizer: The study's tokenizer.
        examples: The questions; `Example.scene` is a row of `inputs`.
        inputs: Inputs of the tower, one row per scene.
        title: Title of the progress bar.
        encoder: The wrapped tower, conditioned on the questions; None for a frozen one.
        without_question: Omit the question from the prompt.
        batch: Questions per call of `generate`.
        show: Whether to show the progress bar.

    Returns:
        One answer per example, in their order.
    """
    model.eval()
    # by task and length, so that short answers do not wait for captions
    order = sorted(range(len(examples)), key=lambda i: (examples[i].task, len(examples[i].answer.split()), i))
    questions = Questions(examples, tokenizer, without_question)
    collate = Collator(inputs, int(tokenizer.pad_token_id), with_answers=False)
    longest = max(len(e.answer.split()) for e in examples) + 1
    found = [""] * len(examples)
    with progress_bar(title, len(examples), show) as report:
        for start in range(0, len(order), batch):
            positions = order[start : start + batch]
            rows = collate([questions[i] for i in positions])
            asked = rows.pop("questions")
            del rows["labels"]
            with encoder.condition(asked) if encoder is not None else nullcontext():
                tokens = model.generate(**rows, max_new_tokens=longest, do_sample=False)
            texts = tokenizer.batch_decode(tokens[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(positions, texts, strict=True):
                found[i] = text.strip()
            report(start + len(positions), None)
    return found


def score(examples: list[Example], answers: list[str]) -> dict[str, float]:
    """Return the exact-match accuracy of each task in percent, and their mean as `mean`."""
    correct: dict[str, list[bool]] = {}
    for example, answer in zip(examples, answers, strict=True):
        correct.setdefault(example.task, []).append(example.answer == answer)
    table = {task: 100 * sum(hits) / len(hits) for task, hits in correct.items()}
    table["mean"] = sum(table.values()) / len(table)
    return table


def most_frequent_answers(train: list[Example], examples: list[Example], with_question: bool) -> list[str]:
    """Answer with the most frequent training answer to the same question, or to any question of its task.

    Args:
        train: Training questions with their answers.
        examples: The questions to answer.
        with_question: Use the question; one that training never asked falls back to its task.
    """
    counts: dict[str, Counter] = {}
    for example in train:
        counts.setdefault(example.task, Counter())[example.answer] += 1
        counts.setdefault(example.question, Counter())[example.answer] += 1
    found = []
    for example in examples:
        known = counts.get(example.question) if with_question else None
        found.append((known or counts[example.task]).most_common(1)[0][0])
    return found


def best_of(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Return the higher score of each task, and the mean of those."""
    tasks = [task for task in first if task != "mean"]
    table = {task: max(first[task], second[task]) for task in tasks}
    table["mean"] = sum(table.values()) / len(table)
    return table
