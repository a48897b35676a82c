"""Scores by teacher forcing, and greedy answers.

An answer is right if the arg max after each of its words, given the words before, is the next: then, and only then,
greedy generation gives it.
"""

from __future__ import annotations

import numpy as np
import torch

from study.data.tasks import TASKS, Example
from study.runs.model import Miniature
from study.runs.tables import IGNORED
from study.runs.train import Questions

BATCH = 500
Hits = dict[str, list[float]]


@torch.no_grad()
def right_answers(model: Miniature, questions: Questions, shuffle_texts: int | None = None) -> np.ndarray:
    """Return which questions the model answers, `(N,)`, bool.

    Args:
        model: LLaVA in miniature.
        questions: The questions.
        shuffle_texts: Seed by which the tower's texts are shuffled over all questions; None leaves them.
    """
    found = []
    table = questions.table
    words = questions.labels.shape[1]
    for rows, pictures in _pictures(model, questions, shuffle_texts):
        ids = questions.ids[rows, : int(table.lengths_N[rows.cpu().numpy()].max())]
        logits = model.answer_logits(pictures, ids, questions.start[rows], words)
        labels = questions.labels[rows]
        found.append(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1))
    return torch.cat(found).cpu().numpy()


@torch.no_grad()
def greedy_answers(
    model: Miniature, questions: Questions, eos: int, shuffle_texts: int | None = None
) -> list[list[int]]:
    """Generate an answer to each question, greedily; return the ids of its words.

    Args:
        model: LLaVA in miniature.
        questions: The questions.
        eos: Id of the last word.
        shuffle_texts: As for `right_answers`.
    """
    found: list[list[int]] = []
    most = questions.labels.shape[1]
    for rows, pictures in _pictures(model, questions, shuffle_texts):
        start = questions.start[rows]
        ids = torch.nn.functional.pad(questions.ids[rows, : int(start.max()) + 1], (0, most))
        each = torch.arange(len(rows), device=ids.device)
        for word in range(most):
            ids[each, start + word + 1] = model.answer_logits(pictures, ids, start + word, 1)[:, 0].argmax(-1)
        answers = ids.gather(1, start[:, None] + torch.arange(1, most + 1, device=ids.device)).tolist()
        found += [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]
    return found


def _pictures(model: Miniature, questions: Questions, shuffle_texts: int | None):  # noqa: ANN202
    """Yield rows of questions and the projected tokens of their pictures."""
    model.eval()
    text = questions.text
    if shuffle_texts is not None:
        text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(shuffle_texts)).to(text.device)]
    cached = None
    if questions.texts is None:
        everything = torch.arange(len(questions.inputs), device=text.device)
        cached = torch.cat(
            [model.project(model.read(questions.tower_inputs(s), None), None) for s in everything.split(BATCH)]
        )
    for rows in torch.arange(len(text), device=text.device).split(BATCH):
        scenes = questions.scene[rows]
        if cached is not None:
            yield rows, cached[scenes]
        else:
            assert questions.texts is not None
            told = questions.texts[text[rows]]
            yield rows, model.project(model.read(questions.tower_inputs(scenes), told), told)


def by_task(examples: list[Example], right: np.ndarray) -> Hits:
    """Group hits by task, in the order of the questions; two questions that are a pair count as one, if both are right.

    Args:
        examples: The questions.
        right: Which are answered.
    """
    hits: Hits = {}
    pairs: dict[tuple[str, int], int] = {}
    for example, hit in zip(examples, right, strict=True):
        found = hits.setdefault(example.task, [])
        if example.pair is not None and TASKS[example.task].metric == "pairs":
            place = pairs.setdefault((example.task, example.pair), len(found))
            if place < len(found):
                found[place] = min(found[place], float(hit))
                continue
        found.append(float(hit))
    return {task: hits[task] for task in TASKS if task in hits}


def percent(hits: Hits) -> dict[str, float]:
    """Return the mean of each task in percent."""
    return {task: round(100 * sum(found) / len(found), 4) for task, found in hits.items()}


def written(hits: Hits) -> dict[str, str | list[float]]:
    """Return hits as a row holds them: a string of 0 and 1 where they are such, else numbers."""
    return {
        task: "".join(str(int(hit)) for hit in found) if set(found) <= {0.0, 1.0} else [round(hit, 5) for hit in found]
        for task, found in hits.items()
    }
