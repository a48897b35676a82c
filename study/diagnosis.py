"""Diagnoses the miniature with `covft.diagnose`: a planted conflict of two tasks, and two halves of one task.

The model is the one that all runs start from: pretrained tower and language model, and a projector that was trained
alone, on captions. Every question is about another picture.
"""

from __future__ import annotations

import random
from typing import Any

import torch

import covft
from covft.analysis.diagnosis import Diagnosis
from covft.errors import ConfigError
from study.data.tasks import TASKS
from study.inspection.agreement import ALL
from study.runs.build import ask, new_llava, new_miniature
from study.runs.methods import tune
from study.runs.model import Miniature, started_at
from study.runs.settings import RunSettings
from study.runs.starts import start
from study.runs.tables import training_part
from study.runs.train import Questions, step_loss

HALVES = ("one half", "other half")


def diagnose_tasks(
    settings: RunSettings, samples: int, device: str = "cpu", *, halves: bool = True, **options: Any
) -> dict[str, Diagnosis]:
    """Diagnose the miniature on its tasks, and on two halves of each.

    Args:
        settings: The run; its method is not used.
        samples: Questions of each diagnosis.
        device: `cpu` or `cuda`.
        halves: Whether to diagnose the halves.
        **options: As for `covft.diagnose`.

    Returns:
        Diagnoses by name: of the tasks together, and of the halves of each.
    """
    settings = settings.replace(method="frozen", options={}, language="frozen", projector=False)
    llava = new_llava(settings)
    start(llava, settings, device)
    encoder = tune(llava, settings, None)
    model = new_miniature(llava, encoder, settings).to(device).eval()
    asked = ask(settings, encoder, training_part(settings), settings.tasks, 0, device)

    def loss(encoder: Any, rows: list[int]) -> torch.Tensor:
        return _loss(model, asked, rows)

    rows, tasks = _rows_of(asked, settings.tasks, samples, settings.seed)
    name = ALL if settings.tasks == tuple(TASKS) else " and ".join(settings.tasks)
    found = {name: covft.diagnose(encoder, rows, kinds=tasks, loss=loss, **options)}
    for task in settings.tasks if halves else ():
        rows, _ = _rows_of(asked, (task,), samples, settings.seed)
        kinds = [HALVES[number % 2] for number in range(len(rows))]
        found[f"halves of {task}"] = covft.diagnose(encoder, rows, kinds=kinds, loss=loss, **options)
    return found


def _rows_of(asked: Questions, tasks: tuple[str, ...], samples: int, seed: int) -> tuple[list[int], list[str]]:
    """Choose questions of tasks in turns, each about another picture; return their rows and tasks."""
    draws = random.Random(seed)
    by_scene: dict[int, dict[str, list[int]]] = {}
    for row, example in enumerate(asked.table.examples):
        by_scene.setdefault(example.scene, {}).setdefault(example.task, []).append(row)
    scenes = draws.sample(sorted(by_scene), len(by_scene))
    rows, chosen = [], []
    for scene in scenes:
        task = tasks[len(rows) % len(tasks)]
        if task in by_scene[scene] and len(rows) < samples:
            rows.append(draws.choice(by_scene[scene][task]))
            chosen.append(task)
    if len(rows) < samples:
        raise ConfigError(
            "The data set has too few pictures.",
            expected=f"{samples} with questions of {', '.join(tasks)}",
            got=len(rows),
        )
    return rows, chosen


def _loss(model: Miniature, asked: Questions, rows: list[int]) -> torch.Tensor:
    """Return the mean loss of some questions' answers."""
    index = torch.tensor(rows, device=asked.ids.device)
    lengths, starts = asked.table.lengths_N[rows], asked.table.start_N[rows]
    with started_at(model.encoder.vit, 0):
        return step_loss(model, asked, index, index, int(lengths.max()), int((lengths - starts - 1).max()), 1)
