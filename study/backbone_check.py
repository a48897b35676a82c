"""The packaged backbone: wrapped, unchanged at the start, and trained for a few steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from covft.utils.parameters import count
from study.backbone import PATCH, packaged_backbone
from study.batches import Questions
from study.data.scenes import Scene, as_batch, make_scenes
from study.data.tasks import make_examples
from study.data.tokenizer import build_tokenizer
from study.llava import build_llava
from study.settings import StudySettings
from study.towers import IMAGE_TOKENS, wrap_tower
from study.train import Schedule, fit
from study.trunk import run_trunk, upper_blocks

SIZE = PATCH * int(IMAGE_TOKENS**0.5)  # 84 pixels, which give as many image tokens as the small ViT
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2's


@dataclass
class BackboneCheck:
    """Measurements on the packaged backbone.

    Attributes:
        difference: Largest output difference by wrapping, relative to the largest output.
        losses: Loss of every training step.
        trained: Trained parameters of the backbone.
    """

    difference: float
    losses: list[float]
    trained: int


def as_backbone_batch(scenes: list[Scene]) -> torch.Tensor:
    """Return the images as the backbone takes them, shape `(B, 3, 84, 84)`."""
    images = torch.from_numpy(as_batch(scenes))
    larger = torch.nn.functional.interpolate(images, SIZE, mode="bilinear")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((larger + 1) / 2 - mean) / std


def check_backbone(settings: StudySettings) -> BackboneCheck:
    """Wrap the packaged backbone, compare its outputs, and train it for a few steps."""
    scenes = make_scenes("train", settings.backbone_scenes, settings.seed)
    examples = make_examples(scenes, settings.tasks, seed=settings.seed)
    vit = packaged_backbone(settings.cache)
    images = as_backbone_batch(scenes)
    first = min(settings.backbone_layers)
    trunk = run_trunk(vit, images, (first,), batch=64)[first]

    asked = [examples[i].question for i in range(8)]
    with torch.no_grad():
        before = vit(images[: len(asked)]).last_hidden_state
        encoder = wrap_tower(vit, settings.backbone_layers, settings)
        after = encoder(images[: len(asked)], asked).last_hidden_state
    difference = float((after - before).abs().max() / before.abs().max())

    model = build_llava(vit, seed=settings.seed)
    schedule = Schedule(
        settings.backbone_steps,
        settings.backbone_batch,
        projector_lr=settings.stage1_lr,  # the projector is random, as in stage 1
        lr=settings.backbone_lr,
        vision_lr=settings.backbone_lr,
        router_lr=settings.router_lr,
        seed=settings.seed,
    )
    with upper_blocks(vit, first):
        losses = fit(
            model, Questions(examples, build_tokenizer()), trunk, schedule, settings.output,
            "Packaged backbone: a few steps", encoder=encoder, show=settings.show,
        )  # fmt: skip
    return BackboneCheck(difference, losses, count(encoder.trainable_parameters()))
