"""How far full tuning on two tasks drives two towers apart, block by block: the paper's Fig. 1c, with a control.

Four towers are trained from one start: on grounding and on captioning, each on either half of the pictures. Two towers
of one half saw the same pictures in the same order, with other questions, as in the paper. Two towers of one task saw
the same kind of question about other pictures: the control.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covft.analysis.stats.distance import parameter_distance
from study.runs.build import ask, new_llava, new_miniature, parameter_groups
from study.runs.methods import tune
from study.runs.model import first_trained, started_at
from study.runs.settings import RunSettings
from study.runs.starts import start
from study.runs.tables import Part, training_order, training_part
from study.runs.train import fit

TASKS = ("grounding", "caption")
STEPS, LOOKS = 200, 8  # of each training: about two epochs of a half; how often weights are kept, beside the start
_OF_A_BLOCK = ("distance", "relative", "cosine")

Weights = dict[str, Tensor]


def measure(settings: RunSettings, device: str = "cpu", report: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train the four towers, and compare each two; return JSON values.

    Args:
        settings: The run; its method and tasks are replaced, and it takes `STEPS` steps at most.
        device: `cpu` or `cuda`.
        report: Called with the number of finished steps of a training, now and then.

    Returns:
        `towers`, a task and a half of the pictures each; `steps`; and by pair of towers, such as `"0 1"`, what
        `parameter_distance` finds in each block, and in all as `""`, at each of these steps.
    """
    settings = settings.replace(method="full", options={}, steps=min(STEPS, settings.steps))
    halves = halves_of(training_part(settings), settings.seed)
    towers = [(task, half) for half in range(len(halves)) for task in TASKS]
    kept = [trained_on(settings, task, halves[half], device, report) for task, half in towers]
    steps = sorted(kept[0])
    pairs = {
        f"{one} {other}": [_apart(kept[one][step], kept[other][step], kept[one][0]) for step in steps[1:]]
        for one, other in itertools.combinations(range(len(towers)), 2)
    }
    return {
        "settings": settings.to_dict(),
        "pictures": len(halves[0].examples) // len(TASKS),
        "batch": _batch(settings),
        "towers": towers,
        "steps": steps[1:],
        "pairs": pairs,
    }


def halves_of(part: Part, seed: int) -> tuple[Part, Part]:
    """Split the pictures with a question of each task into two random halves, as many in each."""
    own = [example for example in part.examples if example.task in TASKS]
    scenes = [{example.scene for example in own if example.task == task} for task in TASKS]
    both = np.random.default_rng([11, seed]).permutation(sorted(set.intersection(*scenes)))
    half = len(both) // 2
    chosen = (set(both[:half].tolist()), set(both[half : 2 * half].tolist()))
    first, second = (Part(part.pictures, [example for example in own if example.scene in scenes]) for scenes in chosen)
    return first, second


def trained_on(
    settings: RunSettings, task: str, part: Part, device: str, report: Callable[[int], None] | None = None
) -> dict[int, Weights]:
    """Train a tower on a task from the start of all runs; return its weights by number of finished steps."""
    settings = settings.replace(tasks=(task,))
    llava = new_llava(settings)
    start(llava, settings, device)
    torch.manual_seed(settings.seed)
    encoder = tune(llava, settings, None)
    model = new_miniature(llava, encoder, settings).to(device)
    first = first_trained(encoder.vit)
    asked = ask(settings, encoder, part, (task,), first, device)
    order = training_order(asked.table, settings.steps, _batch(settings), 1, settings.seed)
    looks = set(np.linspace(0, settings.steps, LOOKS + 1).round().astype(int).tolist())
    kept: dict[int, Weights] = {}

    def keep(step: int) -> None:
        if step in looks:
            kept[step] = {name: value.detach().cpu().clone() for name, value in encoder.vit.state_dict().items()}

    with started_at(encoder.vit, first):  # without the last block, which is not read
        fit(model, asked, order, parameter_groups(llava, encoder, settings), per_picture=1, report=report, watch=keep)
        keep(settings.steps)
    return kept


def _batch(settings: RunSettings) -> int:
    """Return the pictures of a step, as many as in a run: one question is asked about each."""
    return settings.batch // settings.per_picture


def _apart(one: Weights, other: Weights, start: Weights) -> dict[str, list[float | None]]:
    """Return distance, relative distance and cosine of the changes, by number of the block; `""` is all weights."""
    found = parameter_distance(one, other, start)
    blocks = {path.rpartition(".")[2]: values for path, values in found.blocks.items() if path}
    named = {**blocks, "": found.total}
    return {name: [_rounded(getattr(one, key)) for key in _OF_A_BLOCK] for name, one in named.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
