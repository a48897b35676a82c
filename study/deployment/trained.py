"""A trained run with its questions: trained now, or read from a file that an earlier one wrote."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor

import covft
from covft.errors import CheckpointError, ConfigError
from study.runs.build import ask, new_llava, new_miniature
from study.runs.methods import tune
from study.runs.model import Miniature, first_trained
from study.runs.run import Trained, run
from study.runs.settings import RunSettings
from study.runs.tables import held_out_part, training_part
from study.runs.train import Questions

CALIBRATION_SCENES = 1000  # of the training scenes


@dataclass(frozen=True, eq=False)
class Deployed:
    """A trained model of the study.

    Attributes:
        settings: The run.
        llava: The attached model.
        calibration: Questions of training scenes, with pictures.
        scored: Questions that are scored, with what the tower takes from `first` on.
        pictures: The same questions, with pictures.
        first: The block at which the tower starts where pictures are cached.
    """

    settings: RunSettings
    llava: Any
    calibration: Questions
    scored: Questions
    pictures: Questions
    first: int

    def copy(self) -> Any:
        """Return a copy of the attached model, which may be changed."""
        return copy.deepcopy(self.llava)

    def miniature(self, llava: Any, encoder: Any) -> Miniature:
        """Put a model and the tower that it is read from behind the study's bottleneck."""
        return new_miniature(llava, encoder, self.settings).eval()


def train(settings: RunSettings, file: Path) -> None:
    """Train one run and write its model.

    Args:
        settings: The run.
        file: Where to, such as `model.safetensors`.

    Raises:
        ConfigError: If it has no experts.
    """
    if settings.method != "covft":
        raise ConfigError("Only covft has experts to merge.", expected="method='covft'", got=settings.method)

    def keep(trained: Trained) -> dict[str, Any]:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(trained.model.llava, str(file), {"settings": json.dumps(settings.to_dict())})
        return {}

    run(settings, inspect=keep)


def read(file: Path, questions: int | None = None) -> Deployed:
    """Read what `train` wrote.

    Args:
        file: The file.
        questions: Held-out questions per task that are scored, at most; None for those of the run.

    Raises:
        CheckpointError: If it is not such a file.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            settings = RunSettings.from_dict(json.loads(opened.metadata()["settings"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a trained model of the study.", got=repr(error)) from error
    llava = new_llava(settings)
    encoder = tune(llava, settings, None)
    load_model(llava, str(file))
    llava.eval()
    first = first_trained(encoder.vit)
    settings = settings.replace(
        train_scenes=min(settings.train_scenes, CALIBRATION_SCENES),
        held_out_questions=questions or settings.held_out_questions,
    )
    train_part, held_out = training_part(settings), held_out_part(settings)
    asked = (
        ask(settings, encoder, train_part, settings.tasks, 0, "cpu"),
        ask(settings, encoder, held_out, settings.scored, first, "cpu"),
        ask(settings, encoder, held_out, settings.scored, 0, "cpu"),
    )
    return Deployed(settings, llava, *asked, first)


def samples_of(questions: Questions, rows: list[int]) -> tuple[Tensor, Tensor, list[str]]:
    """Return pictures, text features and tasks of some questions, as `covft.merge` takes them."""
    assert questions.texts is not None
    on = torch.tensor(rows)
    pictures = questions.tower_inputs(questions.scene[on])
    return pictures, questions.texts[questions.told[on]], [questions.table.examples[row].task for row in rows]


def spread_rows(questions: Questions, count: int, seed: int) -> list[int]:
    """Choose questions at random, equally many of each task."""
    import random

    by_task: dict[str, list[int]] = {}
    for row, example in enumerate(questions.table.examples):
        by_task.setdefault(example.task, []).append(row)
    draws = random.Random(seed)
    each = -(-count // len(by_task))
    rows = [row for found in by_task.values() for row in draws.sample(found, min(each, len(found)))]
    draws.shuffle(rows)
    return rows


class Plain:
    """A tower without text, in the place of an encoder.

    Args:
        vit: The tower.
    """

    def __init__(self, vit: Any) -> None:
        self.vit = vit

    def __call__(self, inputs: Tensor, text: Tensor | None = None) -> Any:
        """Run it; the text is not looked at."""
        return self.vit(inputs)


def encoder_of(llava: Any) -> Any:
    """Return the encoder of an attached model, or its plain tower in the place of one."""
    try:
        return covft.get_encoder(llava)
    except covft.errors.UnsupportedViTError:
        return Plain(llava.model.vision_tower)
