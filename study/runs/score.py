"""Scores by teacher forcing, and greedy answers.

An answer is right if the arg max after each of its words, given the words before, is the next: then, and only then,
greedy generation gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.data.tasks import TASKS, Example
from study.runs.model import Miniature
from study.runs.tables import IGNORED
from study.runs.train import Questions

BATCH = 500
Hits = dict[str, list[float]]


@torch.no_grad()
def right_answers(model: Miniature, questions: Questions, rows: np.ndarray) -> np.ndarray:
    """Return which questions the model answers, bool.

    Args:
        model: LLaVA in miniature.
        questions: The questions.
        rows: Which of them.
    """
    found = []
    table = questions.table
    for part, pictures in _pictures(model, questions, rows):
        most = int((table.labels_NA[part] != IGNORED).sum(1).max())
        on = torch.from_numpy(part).to(questions.ids.device)
        ids, labels = questions.ids[on, : int(table.lengths_N[part].max())], questions.labels[on, :most]
        logits = model.answer_logits(pictures, ids, questions.start[on], most)
        found.append(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1))
    return torch.cat(found).cpu().numpy()


@torch.no_grad()
def greedy_answers(model: Miniature, questions: Questions, rows: np.ndarray, eos: int) -> list[list[int]]:
    """Generate answers greedily; return the ids of their words.

    Args:
        model: LLaVA in miniature.
        questions: The questions.
        rows: Which of them.
        eos: Id of the last word.
    """
    found: list[list[int]] = []
    most = questions.labels.shape[1]
    for part, pictures in _pictures(model, questions, rows):
        on = torch.from_numpy(part).to(questions.ids.device)
        start = questions.start[on]
        ids = torch.nn.functional.pad(questions.ids[on, : int(start.max()) + 1], (0, most))
        each = torch.arange(len(on), device=ids.device)
        ended = torch.zeros(len(on), dtype=torch.bool, device=ids.device)
        for word in range(most):
            ids[each, start + word + 1] = model.answer_logits(pictures, ids, start + word, 1)[:, 0].argmax(-1)
            ended |= ids[each, start + word + 1] == eos
            if ended.all():
                break
        answers = ids.gather(1, start[:, None] + torch.arange(1, most + 1, device=ids.device)).tolist()
        found += [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]
    return found


def _pictures(model: Miniature, questions: Questions, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield questions in batches, with the projected tokens of their pictures."""
    model.eval()
    device = questions.ids.device
    cached = None
    if questions.texts is None:
        everything = torch.arange(len(questions.inputs), device=device)
        cached = torch.cat(
            [model.project(model.read(questions.tower_inputs(s), None), None) for s in everything.split(BATCH)]
        )
    for part in np.array_split(rows, -(-len(rows) // BATCH)):
        on = torch.from_numpy(part).to(device)
        scenes = questions.scene[on]
        if cached is not None:
            yield part, cached[scenes]
        else:
            assert questions.texts is not None
            told = questions.texts[questions.told[on]]
            yield part, model.project(model.read(questions.tower_inputs(scenes), told), told)


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


def mean_of(scores: dict[str, float]) -> float:
    """Return the mean over the tasks outside the conflict, whose captions have no percent; over all if there is none.

    Args:
        scores: Score of each task.
    """
    counted = [score for task, score in scores.items() if TASKS[task].group != "conflict"] or [*scores.values()]
    return sum(counted) / len(counted)


def written(hits: Hits) -> dict[str, str | list[float]]:
    """Return hits as a row holds them: a string of 0 and 1 where they are such, else numbers."""
    return {
        task: "".join(str(int(hit)) for hit in found) if set(found) <= {0.0, 1.0} else [round(hit, 5) for hit in found]
        for task, found in hits.items()
    }


def score(model: Miniature, questions: Questions) -> dict[str, Any]:
    """Answer questions; return hits by task, and the captions of tasks that are scored by CIDEr.

    Args:
        model: LLaVA in miniature.
        questions: The questions.
    """
    examples = questions.table.examples
    is_caption = np.array([TASKS[example.task].metric == "cider" for example in examples])
    captions: dict[str, list[str]] = {}
    if is_caption.any():
        rows = is_caption.nonzero()[0]
        words = questions.table.words
        answers = greedy_answers(model, questions, rows, words.end)
        for row, answer in zip(rows, answers, strict=True):
            captions.setdefault(examples[row].task, []).append(words.text_of(answer))
    rows = (~is_caption).nonzero()[0]
    hits = by_task([examples[row] for row in rows], right_answers(model, questions, rows)) if len(rows) else {}
    return {"hits": hits, "captions": captions}
