"""The packaged backbone: tuned, unchanged at the start, and trained for a few steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from study.runs.build import (
    count_trained,
    new_llava,
    new_miniature,
    parameter_groups,
    pictures_of,
    tower_inputs,
)
from study.runs.methods import tune
from study.runs.model import started_at
from study.runs.settings import RunSettings
from study.runs.tables import table_of, training_order, training_part
from study.runs.texts import text_rows
from study.runs.train import Questions, as_tower_takes, fit

COMPARED = 8


@dataclass
class BackboneCheck:
    """Measurements on the packaged backbone.

    Attributes:
        difference: Largest output difference by wrapping, relative to the largest output.
        losses: Mean loss of each of up to 64 equal parts of training.
        steps: Steps of training.
        trained: Trained parameters of the backbone.
    """

    difference: float
    losses: list[float]
    steps: int
    trained: int

    @property
    def ends(self) -> tuple[float, float]:
        """Mean loss of the first fifth and of the last."""
        fifth = max(1, len(self.losses) // 5)
        return sum(self.losses[:fifth]) / fifth, sum(self.losses[-fifth:]) / fifth


def check_backbone(settings: RunSettings) -> BackboneCheck:
    """Wrap the packaged backbone, compare its outputs, and train it for a few steps."""
    part = training_part(settings)
    table = table_of(part, settings.tasks)
    texts = text_rows(settings, table, states=False)
    told = texts[table.text_N[:COMPARED]]
    images = as_tower_takes(pictures_of(settings, part)[: len(told)])

    llava = new_llava(settings)
    vit = llava.model.vision_tower
    first = min(settings.layers or (0,))
    states = tower_inputs(settings, part, first, "cpu")
    with torch.no_grad():
        before = vit(images).last_hidden_state
        torch.manual_seed(settings.seed)
        encoder = tune(llava, settings, None)
        after = encoder.eval()(images, told).last_hidden_state
    difference = float((after - before).abs().max() / before.abs().max())

    asked = Questions.of(table, states, texts)
    order = training_order(table, settings.steps, settings.batch, settings.per_picture, settings.seed)
    with started_at(vit, first):
        losses = fit(
            new_miniature(llava, encoder, settings), asked, order, parameter_groups(llava, encoder, settings),
            per_picture=settings.per_picture,
        )  # fmt: skip
    return BackboneCheck(difference, losses, settings.steps, count_trained(vit))
