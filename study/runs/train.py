"""The training loop: a step is an index into tensors on the device, forward, backward and the optimizer.

It is a plain loop and not transformers' Trainer, so that a GPU can replay its steps (`graph.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.runs.graph import graphed
from study.runs.model import Miniature
from study.runs.tables import Table, shuffled_within

KEPT_LOSSES = 64
WEIGHT_DECAY, LARGEST_NORM = 0.01, 1.0
_LOOK = 50  # steps between looks at the clock


class OutOfTime(Exception):
    """The time limit was reached in the middle of a run."""


@dataclass(frozen=True, eq=False)
class Questions:
    """A table on the device, with the pictures and the texts that it points into.

    Attributes:
        table: The table.
        inputs: What the tower takes for each scene: uint8 pictures `(scenes, H, W, 3)`, or cached states.
        texts: What the tower is told for each distinct question; None if it reads none.
        told: Which of the texts the tower is told about each question: its own, where nothing is shuffled.
        ids: As in the table, and so are the others.
    """

    table: Table
    inputs: Tensor
    texts: Tensor | None
    told: Tensor
    ids: Tensor
    start: Tensor
    labels: Tensor
    scene: Tensor

    @classmethod
    def of(cls, table: Table, inputs: Tensor, texts: Tensor | None, shuffle: int | None = None) -> Questions:
        """Move a table to the device of its pictures.

        Args:
            table: The table.
            inputs: What the tower takes for each scene.
            texts: What the tower is told for each distinct question.
            shuffle: Seed by which the texts of all questions are shuffled; None leaves them.
        """
        told = table.text_N if shuffle is None else np.random.default_rng([7, shuffle]).permutation(table.text_N)
        arrays = (told, table.ids_NL, table.start_N, table.labels_NA, table.scene_N)
        moved = (torch.from_numpy(array).to(inputs.device) for array in arrays)
        return cls(table, inputs, None if texts is None else texts.to(inputs.device), *moved)

    def tower_inputs(self, scenes: Tensor) -> Tensor:
        """Return what the tower takes for some scenes."""
        return as_tower_takes(self.inputs[scenes])


def as_tower_takes(inputs: Tensor) -> Tensor:
    """Turn uint8 pictures `(B, H, W, 3)` into floats in [-1, 1], `(B, 3, H, W)`; states stay as they are."""
    if inputs.dtype != torch.uint8:
        return inputs
    return inputs.permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(
    model: Miniature,
    questions: Questions,
    order: np.ndarray,
    groups: list[dict[str, Any]],
    *,
    per_picture: int,
    shuffle_texts: int | None = None,
    graph: bool = True,
    deadline: float | None = None,
    report: Callable[[int], None] | None = None,
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """Train in place with AdamW, cosine decay after a short warm-up, and gradients clipped at 1.

    Args:
        model: LLaVA in miniature; whatever requires a gradient is trained.
        questions: Training questions.
        order: The questions of each step, `(steps, batch)`, those about one picture side by side.
        groups: Groups for the optimizer.
        per_picture: Questions about one picture in a batch.
        shuffle_texts: Seed by which the texts of each batch are shuffled; None leaves them.
        graph: Whether a GPU replays one recorded step; not where the host draws anew for each step.
        deadline: Time (`time.monotonic`) at which to stop.
        report: Called with the number of finished steps, now and then.
        watch: Called with the number of finished steps once the gradients of a step are there. Steps are not recorded
            then.

    Returns:
        The mean loss of each 1/64 of training.

    Raises:
        OutOfTime: If the deadline is reached.
    """
    from transformers import get_cosine_schedule_with_warmup

    steps, device = len(order), questions.ids.device
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    decay = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    table = questions.table
    texts = table.text_N[order] if shuffle_texts is None else shuffled_within(table.text_N[order], shuffle_texts)
    order_on, texts_on = torch.from_numpy(order).to(device), torch.from_numpy(texts).to(device)
    model.train()

    def padded(rows: Tensor, told: Tensor) -> Tensor:
        """The loss at the lengths of the longest question and answer of all."""
        return step_loss(model, questions, rows, told, table.ids_NL.shape[1], table.labels_NA.shape[1], per_picture)

    factors = [decay.lr_lambdas[0](step) for step in range(steps)]
    recorded = None
    if graph and watch is None:
        recorded = graphed(padded, (order_on, texts_on), groups, factors, weight_decay=WEIGHT_DECAY, clip=LARGEST_NORM)
    if recorded is not None:
        for step in range(steps):
            recorded()
            _look(step, deadline, report)
        return means(recorded.losses.tolist())
    trained = [parameter for group in groups for parameter in group["params"]]
    longest = table.lengths_N[order].max(1).tolist()
    words = (table.lengths_N - table.start_N - 1)[order].max(1).tolist()
    losses = torch.zeros(steps, device=device)
    for step in range(steps):
        optimizer.zero_grad()
        loss = step_loss(model, questions, order_on[step], texts_on[step], longest[step], words[step], per_picture)
        loss.backward()
        if watch is not None:
            watch(step)
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
        optimizer.step()
        decay.step()
        losses[step] = loss.detach()
        _look(step, deadline, report)
    return means(losses.tolist())


def _look(step: int, deadline: float | None, report: Callable[[int], None] | None) -> None:
    """Now and then, look at the clock, and report."""
    if step % _LOOK:
        return
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()  # else the host would be far ahead
    if deadline is not None and time.monotonic() > deadline:
        raise OutOfTime
    if report is not None:
        report(step)


def step_loss(
    model: Miniature, questions: Questions, rows: Tensor, texts: Tensor, longest: int, words: int, per_picture: int
) -> Tensor:
    """Return the mean loss of the answers' words.

    Args:
        model: LLaVA in miniature.
        questions: The questions.
        rows: Which of them, `(R,)`, those about one picture side by side.
        texts: What the tower is told for each: rows of `questions.texts`.
        longest: Words of the longest of their texts.
        words: Words of the longest of their answers.
        per_picture: Questions about one picture.
    """
    scenes = questions.scene[rows]
    if questions.texts is None:
        # the tower sees no question, so it runs once for all questions about a picture
        patches = model.read(questions.tower_inputs(scenes[::per_picture]), None)
        pictures = model.project(patches, None).repeat_interleave(per_picture, 0)
    else:
        told = questions.texts[texts]
        pictures = model.project(model.read(questions.tower_inputs(scenes), told), told)
    logits = model.answer_logits(pictures, questions.ids[rows, :longest], questions.start[rows], words)
    labels = questions.labels[rows, :words]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def means(losses: Sequence[float], count: int = KEPT_LOSSES) -> list[float]:
    """Return the means of equal parts of training."""
    return [round(float(part.mean()), 5) for part in np.array_split(np.array(losses), count) if len(part)]
