"""The packaged backbone: tuned, unchanged at the start, and trained for a few steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from study.backbone import PATCH
from study.data.scenes import Scene, as_batch, make_scenes
from study.runs.build import count_trained, new_llava, new_miniature, parameter_groups
from study.runs.methods import tune
from study.runs.model import started_at
from study.runs.settings import RunSettings
from study.runs.tables import DATA_SEED, table_of, training_order, training_part
from study.runs.texts import text_rows
from study.runs.train import Questions, fit
from study.towers import IMAGE_TOKENS
from study.trunk import run_trunk

SIZE = PATCH * int(IMAGE_TOKENS**0.5)  # 84 pixels, which give as many image tokens as the small ViT
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2's
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


def as_backbone_batch(scenes: list[Scene]) -> torch.Tensor:
    """Return the images as the backbone takes them, shape `(B, 3, 84, 84)`."""
    images = torch.from_numpy(as_batch(scenes))
    larger = torch.nn.functional.interpolate(images, SIZE, mode="bilinear")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((larger + 1) / 2 - mean) / std


def check_backbone(settings: RunSettings) -> BackboneCheck:
    """Wrap the packaged backbone, compare its outputs, and train it for a few steps."""
    images = as_backbone_batch(make_scenes("train", settings.train_scenes, DATA_SEED))
    table = table_of(training_part(settings), settings.tasks)
    texts = text_rows(settings, table, states=False)
    told = texts[table.text_N[:COMPARED]]

    llava = new_llava(settings)
    vit = llava.model.vision_tower
    first = min(settings.layers or (0,))
    states = run_trunk(vit, images, (first,), batch=64)[first]
    with torch.no_grad():
        before = vit(images[: len(told)]).last_hidden_state
        torch.manual_seed(settings.seed)
        encoder = tune(llava, settings, None)
        after = encoder.eval()(images[: len(told)], told).last_hidden_state
    difference = float((after - before).abs().max() / before.abs().max())

    asked = Questions.of(table, states, texts)
    order = training_order(table, settings.steps, settings.batch, settings.per_picture, settings.seed)
    with started_at(vit, first):
        losses = fit(
            new_miniature(llava, encoder, settings), asked, order, parameter_groups(llava, encoder, settings),
            per_picture=settings.per_picture,
        )  # fmt: skip
    return BackboneCheck(difference, losses, settings.steps, count_trained(vit))
