"""The comparison: one LLaVA, trained with a frozen ViT and with CoVFT, on the same data in the same order."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from study.batches import Questions
from study.data.scenes import Scene, as_batch, make_scenes
from study.data.tasks import Example, make_examples
from study.data.tokenizer import build_tokenizer
from study.evaluate import generate_answers
from study.llava import build_llava
from study.progress import timed
from study.settings import StudySettings
from study.towers import small_vit, wrap_tower
from study.train import Schedule, fit
from study.trunk import depth, install_recording, run_trunk, upper_blocks

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

    from covft import ContextEncoder


@dataclass
class Part:
    """Scenes, their questions and their cached hidden states.

    Attributes:
        scenes: The scenes.
        examples: Their questions.
        states: Hidden states by index, shape `(N, tokens, D)`; the held-out part has a last row for a blank image.
    """

    scenes: list[Scene]
    examples: list[Example]
    states: dict[int, torch.Tensor]


@dataclass
class Comparison:
    """Settings, data and wall times that both methods share."""

    settings: StudySettings
    tokenizer: PreTrainedTokenizerFast
    train: Part
    held_out: Part
    seconds: dict[str, float]


@dataclass
class TrainedModel:
    """A model after stage 2.

    Attributes:
        model: LLaVA.
        start: The block that its tower starts at, which is the key of its inputs in `Part.states`.
        encoder: The wrapped tower; None with a frozen one.
        losses: Loss of every step.
    """

    model: LlavaForConditionalGeneration
    start: int
    encoder: ContextEncoder | None
    losses: list[float]


def prepare(settings: StudySettings) -> Comparison:
    """Draw scenes and questions, and run the frozen blocks once over all images."""
    seconds: dict[str, float] = {}
    vit = small_vit()
    with timed(seconds, "data"):
        train = make_scenes("train", settings.train_scenes, settings.seed)
        held_out = make_scenes(settings.split, settings.test_scenes, settings.seed)
        train_examples = make_examples(train, settings.tasks, seed=settings.seed)
        held_out_examples = make_examples(held_out, settings.tasks, settings.test_questions, settings.seed)
    with timed(seconds, "trunk"):
        states = (min(settings.layers), depth(vit) - 1)
        blank = np.zeros((1, *as_batch(held_out[:1]).shape[1:]), np.float32)
        parts = [
            Part(scenes, examples, run_trunk(vit, torch.from_numpy(images), states))
            for scenes, examples, images in (
                (train, train_examples, as_batch(train)),
                (held_out, held_out_examples, np.concatenate([as_batch(held_out), blank])),
            )
        ]
    return Comparison(settings, build_tokenizer(), *parts, seconds)


def train_projector(comparison: Comparison) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Run stage 1, which trains the projector on captions; return its weights and the losses."""
    settings = comparison.settings
    model, start = _new_llava(settings)
    captions = make_examples(comparison.train.scenes, ("caption",), seed=settings.seed)
    schedule = Schedule(settings.stage1_steps, settings.batch, settings.stage1_lr, seed=settings.seed)
    with timed(comparison.seconds, "stage 1"), upper_blocks(model.model.vision_tower, start):
        losses = fit(
            model, Questions(captions, comparison.tokenizer), comparison.train.states[start], schedule,
            settings.output, "Stage 1: projector on captions", show=settings.show,
        )  # fmt: skip
    return copy.deepcopy(model.model.multi_modal_projector.state_dict()), losses


def tune_on_instructions(comparison: Comparison, projector: dict[str, torch.Tensor], method: str) -> TrainedModel:
    """Run stage 2 for one method, from the given projector and the pretrained language model."""
    settings = comparison.settings
    model, start = _new_llava(settings)
    vit = model.model.vision_tower
    model.model.multi_modal_projector.load_state_dict(projector)
    encoder = None
    if method == "covft":
        start = min(settings.layers)
        encoder = wrap_tower(vit, settings.layers, settings)
    schedule = Schedule(
        settings.steps,
        settings.batch,
        projector_lr=settings.projector_lr,
        lr=settings.lr,
        vision_lr=settings.vision_lr,
        router_lr=settings.router_lr,
        seed=settings.seed,
    )
    with timed(comparison.seconds, f"stage 2 ({method})"), upper_blocks(vit, start):
        if encoder is not None:
            # fills the encoder's cache in one call
            examples = (*comparison.train.examples, *comparison.held_out.examples)
            encoder.encode_text(sorted({example.question for example in examples}))
        losses = fit(
            model, Questions(comparison.train.examples, comparison.tokenizer), comparison.train.states[start],
            schedule, settings.output, f"Stage 2: instructions, {method}", encoder=encoder, show=settings.show,
        )  # fmt: skip
    return TrainedModel(model, start, encoder, losses)


def answer_held_out(
    comparison: Comparison, trained: TrainedModel, title: str, *, blank: bool = False, without_question: bool = False
) -> list[str]:
    """Answer the held-out questions.

    Args:
        comparison: Settings and data.
        trained: The model.
        title: Title of the progress bar.
        blank: Replace every image by a blank one.
        without_question: Omit the question from the prompt.
    """
    states = comparison.held_out.states[trained.start]
    if blank:
        states = states[-1:].expand_as(states)
    with timed(comparison.seconds, "evaluation"), upper_blocks(trained.model.model.vision_tower, trained.start):
        return generate_answers(
            trained.model, comparison.tokenizer, comparison.held_out.examples, states, title,
            encoder=trained.encoder, without_question=without_question, show=comparison.settings.show,
        )  # fmt: skip


def _new_llava(settings: StudySettings) -> tuple[LlavaForConditionalGeneration, int]:
    """Build LLaVA around the small ViT; return it with the ViT's last block, where a frozen tower starts."""
    vit = small_vit()
    install_recording(vit)
    return build_llava(vit, seed=settings.seed), depth(vit) - 1
