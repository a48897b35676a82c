"""The real tower at work: wrapped, unchanged at the start, and a short training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from study.batches import Questions
from study.llava import build_llava
from study.packaged import PATCH, packaged_backbone
from study.scenes import Scene, as_batch, make_scenes
from study.settings import MiniSettings
from study.tasks import make_examples
from study.towers import IMAGE_TOKENS, text_encoder_folder
from study.train import Schedule, fit
from study.trunk import run_trunk, upper_blocks
from study.words import build_tokenizer

SIZE = PATCH * int(IMAGE_TOKENS**0.5)  # 84 pixels: as many image tokens as the small ViT has
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what DINOv2 was trained with


@dataclass
class BackboneResult:
    """What the real tower showed.

    Attributes:
        difference: Largest change of an output by wrapping, relative to the largest output.
        losses: Loss of every training step.
        trained: Number of trained parameters in the tower.
    """

    difference: float
    losses: list[float]
    trained: int


def as_backbone_batch(scenes: list[Scene]) -> torch.Tensor:
    """Pictures as the backbone takes them, shape `(B, 3, 84, 84)`."""
    pictures = torch.from_numpy(as_batch(scenes))
    larger = torch.nn.functional.interpolate(pictures, SIZE, mode="bilinear")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((larger + 1) / 2 - mean) / std


def show_backbone(settings: MiniSettings) -> BackboneResult:
    """Wrap the packaged backbone, compare outputs, train it for a few steps."""
    import covft

    scenes = make_scenes("train", settings.tower_scenes, settings.seed)
    examples = make_examples(scenes, settings.tasks, seed=settings.seed)
    vit = packaged_backbone(settings.cache)
    pictures = as_backbone_batch(scenes)
    first = min(settings.tower_layers)
    trunk = run_trunk(vit, pictures, (first,), batch=64)[first]

    asked = [examples[i].question for i in range(8)]
    with torch.no_grad():
        before = vit(pictures[: len(asked)]).last_hidden_state
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            encoder = covft.wrap(
                vit, text_encoder_folder(), layers=settings.tower_layers, experts=settings.experts,
                train_norms="adapted",
            )  # fmt: skip
        after = encoder(pictures[: len(asked)], asked).last_hidden_state
    difference = float((after - before).abs().max() / before.abs().max())

    model = build_llava(vit, seed=settings.seed)
    schedule = Schedule(
        settings.tower_steps,
        settings.tower_batch,
        projector_lr=settings.stage1_lr,  # its projector is new, as in stage 1
        lr=settings.tower_lr,
        vision_lr=settings.tower_lr,
        router_lr=settings.router_lr,
        seed=settings.seed,
    )
    with upper_blocks(vit, first):
        losses = fit(
            model, Questions(examples, build_tokenizer()), trunk, schedule, settings.output,
            "Real tower: a short training", encoder=encoder, show=settings.show,
        )  # fmt: skip
    return BackboneResult(difference, losses, sum(p.numel() for p in encoder.trainable_parameters()))
