"""The training loop: a step is an index into tensors on the device, forward, backward and the optimizer.

It is a plain loop, because a step of these networks takes a GPU a few milliseconds, which is what the collator, inputs
and callbacks of transformers' Trainer take Python.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.runs.model import Miniature
from study.runs.tables import Table, shuffled_within

KEPT_LOSSES = 64
_LOOK = 50  # steps between looks at the clock
_WARM_UP = 4  # steps before one is recorded, as torch asks


class OutOfTime(Exception):
    """The time limit was reached in the middle of a run."""


@dataclass(frozen=True, eq=False)
class Questions:
    """A table on the device, with the pictures and the texts that it points into.

    Attributes:
        table: The table.
        inputs: What the tower takes for each scene: uint8 pictures `(scenes, H, W, 3)`, or cached states.
        texts: What the tower is told for each distinct question; None if it reads none.
        ids: As in the table, and so are the others.
    """

    table: Table
    inputs: Tensor
    texts: Tensor | None
    ids: Tensor
    start: Tensor
    labels: Tensor
    scene: Tensor
    text: Tensor

    @classmethod
    def of(cls, table: Table, inputs: Tensor, texts: Tensor | None) -> Questions:
        """Move a table to the device of its pictures."""
        device = inputs.device
        arrays = (table.ids_NL, table.start_N, table.labels_NA, table.scene_N, table.text_N)
        moved = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(table, inputs, None if texts is None else texts.to(device), *moved)

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
    graph: bool = False,
    deadline: float | None = None,
    report: Callable[[int], None] | None = None,
) -> list[float]:
    """Train in place with AdamW, cosine decay after a short warm-up, and gradients clipped at 1.

    Args:
        model: LLaVA in miniature; whatever requires a gradient is trained.
        questions: Training questions.
        order: The questions of each step, `(steps, batch)`, those about one picture side by side.
        groups: Groups for the optimizer, each with its peak learning rate.
        per_picture: Questions about one picture in a batch.
        shuffle_texts: Seed by which the texts of each batch are shuffled; None leaves them.
        graph: Whether to record a step as a CUDA graph and replay it.
        deadline: Time (`time.monotonic`) at which to stop.
        report: Called with the number of finished steps, now and then.

    Returns:
        The mean loss of each 1/64 of training.

    Raises:
        OutOfTime: If the deadline is reached.
    """
    steps = Steps(model, questions, order, groups, per_picture, shuffle_texts)
    model.train()
    take = steps.take
    for step in range(len(order)):
        if graph and step == _WARM_UP:
            take = steps.recorded()
        take(step)
        if step % _LOOK == 0:
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime
            if report is not None:
                report(step)
            if graph:
                torch.cuda.current_stream().synchronize()  # else the queue runs minutes ahead of the clock
    return means(steps.losses.tolist())


class Steps:
    """The steps of one training. Which is next is counted on the device, so that a step is the same work each time.

    Args:
        model: As for `fit`, and so are the others.
        questions: Training questions.
        order: The questions of each step.
        groups: Groups for the optimizer.
        per_picture: Questions about one picture in a batch.
        shuffle_texts: Seed by which the texts of each batch are shuffled.

    Attributes:
        losses: The loss of each step, on the device.
    """

    def __init__(
        self,
        model: Miniature,
        questions: Questions,
        order: np.ndarray,
        groups: list[dict[str, Any]],
        per_picture: int,
        shuffle_texts: int | None,
    ) -> None:
        self.model, self.questions, self.per_picture = model, questions, per_picture
        table, device = questions.table, questions.ids.device
        on_gpu = device.type == "cuda"
        lengths, words = table.lengths_N[order], (table.lengths_N - table.start_N - 1)[order]
        # a GPU does not mind padding, and a graph needs equal shapes
        self.longest = lengths.max(1).tolist() if not on_gpu else [int(lengths.max())] * len(order)
        self.words = words.max(1).tolist() if not on_gpu else [int(words.max())] * len(order)
        texts = table.text_N[order]
        if shuffle_texts is not None:
            texts = shuffled_within(texts, shuffle_texts)
        self.order, self.texts = torch.from_numpy(order).to(device), torch.from_numpy(texts).to(device)
        self.losses = torch.zeros(len(order), device=device)
        self.next = torch.zeros(1, dtype=torch.long, device=device)
        groups = [dict(group) for group in groups if group["params"]]
        peaks = torch.tensor([group["lr"] for group in groups], dtype=torch.float32)
        self.rates = (schedule(len(order))[:, None] * peaks).to(device)
        self.rate = self.rates[0].clone()
        for group, rate in zip(groups, self.rate, strict=True):
            group["lr"] = rate  # a view, which is filled in each step
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True, capturable=on_gpu)

    def take(self, step: int) -> None:
        """Take the next step.

        Args:
            step: Its number, for the lengths of its rows.
        """
        rows, texts = (every.index_select(0, self.next)[0] for every in (self.order, self.texts))
        loss = step_loss(
            self.model, self.questions, rows, texts, self.longest[step], self.words[step], self.per_picture
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.rate.copy_(self.rates.index_select(0, self.next)[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.index_copy_(0, self.next, loss.detach()[None])
        self.next += 1

    def recorded(self) -> Callable[[int], None]:
        """Record a step as a CUDA graph; return what replays it. Some steps must have been taken before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.take(0)
        return lambda step: graph.replay()


def schedule(steps: int) -> Tensor:
    """Return the share of the peak learning rate in each step: up in a twentieth of them, then half a cosine down."""
    warm_up = max(1, steps // 20)
    step = torch.arange(steps, dtype=torch.float64)
    down = 0.5 * (1 + torch.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
    return torch.where(step < warm_up, step / warm_up, down).float()


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
        pictures = model.project(patches).repeat_interleave(per_picture, 0)
    else:
        pictures = model.project(model.read(questions.tower_inputs(scenes), questions.texts[texts]))
    logits = model.answer_logits(pictures, questions.ids[rows, :longest], questions.start[rows], words)
    labels = questions.labels[rows, :words]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def means(losses: Sequence[float], count: int = KEPT_LOSSES) -> list[float]:
    """Return the means of equal parts of training."""
    return [round(float(part.mean()), 5) for part in np.array_split(np.array(losses), count) if len(part)]
