"""One run, from its settings to its row."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

import covft
from study.progress import timed
from study.runs.build import (
    GREY,
    ask,
    count_trained,
    new_llava,
    new_miniature,
    parameter_groups,
    pictures_of,
    tower_inputs,
)
from study.runs.captions import with_captions
from study.runs.methods import tune
from study.runs.model import Miniature, first_trained, started_at
from study.runs.score import score
from study.runs.settings import RunSettings
from study.runs.starts import start
from study.runs.tables import Part, held_out_part, training_order, training_part
from study.runs.train import Questions, as_tower_takes, fit


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, before it is dropped.

    Attributes:
        settings: The run.
        model: LLaVA in miniature.
        questions: The scored questions, with what the tower takes from `first` on.
        first: The block at which the tower starts (`study.runs.model.started_at`).
    """

    settings: RunSettings
    model: Miniature
    questions: Questions
    first: int


Inspect = Callable[[Trained], dict[str, Any]]
Watch = Callable[[Any, int], None]


def run(
    settings: RunSettings,
    studies: Iterable[str] = (),
    *,
    device: str = "cpu",
    deadline: float | None = None,
    report: Callable[[int], None] | None = None,
    inspect: Inspect | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train and score one model; return its row.

    Args:
        settings: The run.
        studies: Names of the studies that it belongs to.
        device: `cpu` or `cuda`.
        deadline: Time (`time.monotonic`) at which to stop.
        report: Called with the number of finished steps, now and then.
        inspect: Looks at the trained model; what it returns joins the row as `inspection`.
        watch: Looks at the tower's encoder in each step, given the number of finished steps, when gradients are there.

    Raises:
        OutOfTime: If the deadline is reached.
    """
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    seconds: dict[str, float] = {}
    with timed(seconds, "prepare"):
        train, held_out = training_part(settings), held_out_part(settings)
        llava = new_llava(settings)
        before = start(llava, settings, device)
        torch.manual_seed(settings.seed)
        encoder = tune(llava, settings, as_tower_takes(pictures_of(settings, train)[: settings.batch]))
        model = new_miniature(llava, encoder, settings).to(device)
        first = first_trained(encoder.vit)
        shuffled = settings.control in ("shuffled", "shuffled_eval")
        asked = ask(settings, encoder, train, settings.tasks, first, device, fraction=settings.fraction)
        scored = ask(
            settings, encoder, held_out, settings.scored, first, device,
            shuffle=settings.seed if shuffled else None,
        )  # fmt: skip
        order = training_order(asked.table, settings.steps, settings.batch, settings.per_picture, settings.seed)
    with started_at(encoder.vit, first):
        with timed(seconds, "train"):
            losses = fit(
                model, asked, order, parameter_groups(llava, encoder, settings),
                per_picture=settings.per_picture,
                shuffle_texts=settings.seed if settings.control == "shuffled" else None,
                graph=settings.routing != "random",
                deadline=deadline,
                report=report,
                watch=None if watch is None else partial(watch, encoder),
            )  # fmt: skip
        with timed(seconds, "score"):
            found = score(model, scored)
            floors = _floors(model, settings, scored, held_out, first, device) if settings.method == "frozen" else {}
    seen = {}
    if inspect is not None:
        with timed(seconds, "inspect"):
            seen["inspection"] = inspect(Trained(settings, model, scored, first))
    row = {
        "name": settings.name,
        "label": settings.label,
        "studies": list(studies),
        "settings": settings.to_dict(),
        "rates": dict(zip(("vision_lr", "router_lr"), settings.rates(), strict=True)),
        "seed": settings.seed,
        "split": settings.split,
        "found": {"": found, **floors, **({"before": before} if before else {})},
        "trained": {"tower": count_trained(encoder.vit), "all": count_trained(llava)},
        "losses": losses,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **seen,
    }
    return with_captions(row)


def _floors(
    model: Miniature, settings: RunSettings, scored: Questions, part: Part, first: int, device: str
) -> dict[str, dict[str, Any]]:
    """Score the frozen model shown a blank picture, and not given the question."""
    grey = tower_inputs(settings, Part(np.full_like(part.pictures[:1], GREY), []), first, device)
    blank = grey.expand(len(part.pictures), *[-1] * (grey.dim() - 1))
    unasked = ask(settings.replace(control="tower_only"), model.encoder, part, settings.scored, first, device)
    return {"no_image": score(model, replace(scored, inputs=blank)), "no_question": score(model, unasked)}


def versions() -> dict[str, str]:
    """Return the releases that a run depends on."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "covft": covft.__version__,
    }
