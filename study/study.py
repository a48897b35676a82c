"""The comparison: the same LLaVA, the same data in the same order, a frozen tower or one with CoVFT."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from study.batches import Questions
from study.evaluate import answer
from study.llava import build_llava
from study.scenes import Scene, as_batch, make_scenes
from study.settings import MiniSettings
from study.tasks import Example, make_examples
from study.towers import small_vit, text_encoder_folder
from study.train import Schedule, fit
from study.trunk import depth, run_trunk, upper_blocks
from study.words import build_tokenizer

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

    from covft import ContextEncoder


@dataclass
class Part:
    """Scenes with their questions and what the trunk gives for them.

    Attributes:
        scenes: The scenes.
        examples: Their questions.
        states: Hidden states by index, `(N, tokens, D)`; N may be one more than the scenes: a blank picture.
    """

    scenes: list[Scene]
    examples: list[Example]
    states: dict[int, torch.Tensor]


@dataclass
class Study:
    """Everything that both methods share."""

    settings: MiniSettings
    tokenizer: PreTrainedTokenizerFast
    train: Part
    held_out: Part
    seconds: dict[str, float]

    @property
    def first(self) -> int:
        """The first adapted block; what lies before it is the frozen trunk."""
        return min(self.settings.layers)


@dataclass
class Trained:
    """A trained model and where its tower starts.

    Attributes:
        model: LLaVA.
        start: The block that the tower starts at, the key of its pictures in `Part.states`.
        encoder: The wrapped tower of CoVFT.
        losses: Loss of every step.
    """

    model: LlavaForConditionalGeneration
    start: int
    encoder: ContextEncoder | None
    losses: list[float]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of what runs inside to `seconds[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def prepare(settings: MiniSettings) -> Study:
    """Draw scenes and questions, run the trunk over all pictures."""
    seconds: dict[str, float] = {}
    vit = small_vit()
    with timed(seconds, "data"):
        train = make_scenes("train", settings.train_scenes, settings.seed)
        held_out = make_scenes(settings.split, settings.test_scenes, settings.seed)
        asked = make_examples(train, settings.tasks, seed=settings.seed)
        kept = make_examples(held_out, settings.tasks, settings.test_questions, settings.seed)
    with timed(seconds, "trunk"):
        states = (min(settings.layers), depth(vit) - 1)
        blank = np.zeros((1, *as_batch(held_out[:1]).shape[1:]), np.float32)
        parts = [
            Part(scenes, examples, run_trunk(vit, torch.from_numpy(pictures), states))
            for scenes, examples, pictures in (
                (train, asked, as_batch(train)),
                (held_out, kept, np.concatenate([as_batch(held_out), blank])),
            )
        ]
    return Study(settings, build_tokenizer(), *parts, seconds)


def first_stage(study: Study) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Stage 1: the projector alone learns to caption; returns its weights and the losses."""
    settings = study.settings
    vit = small_vit()
    start = depth(vit) - 1
    run_trunk(vit, torch.zeros(1, 3, vit.config.image_size, vit.config.image_size), ())
    model = build_llava(vit, seed=settings.seed)
    captions = make_examples(study.train.scenes, ("caption",), seed=settings.seed)
    schedule = Schedule(settings.stage1_steps, settings.batch, settings.stage1_lr, seed=settings.seed)
    with timed(study.seconds, "stage 1"), upper_blocks(vit, start):
        losses = fit(
            model, Questions(captions, study.tokenizer), study.train.states[start], schedule, settings.output,
            "Stage 1: projector on captions", show=settings.show,
        )  # fmt: skip
    return copy.deepcopy(model.model.multi_modal_projector.state_dict()), losses


def second_stage(study: Study, projector: dict[str, torch.Tensor], method: str) -> Trained:
    """Stage 2: instruction tuning from the same projector and language model, for one method."""
    import covft

    settings = study.settings
    vit = small_vit()
    run_trunk(vit, torch.zeros(1, 3, vit.config.image_size, vit.config.image_size), ())
    model = build_llava(vit, seed=settings.seed)
    model.model.multi_modal_projector.load_state_dict(projector)
    encoder, start = None, depth(vit) - 1
    if method == "covft":
        start = study.first
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            encoder = covft.wrap(
                vit, text_encoder_folder(), layers=settings.layers, experts=settings.experts,
                routing=settings.routing, train_norms="adapted",
            )  # fmt: skip
    schedule = Schedule(
        settings.steps,
        settings.batch,
        projector_lr=settings.projector_lr,
        lr=settings.lr,
        vision_lr=settings.vision_lr,
        router_lr=settings.router_lr,
        seed=settings.seed,
    )
    with timed(study.seconds, f"stage 2, {method}"), upper_blocks(vit, start):
        if encoder is not None:
            # each distinct question is encoded once; its features are cached by the encoder
            encoder.encode_text(sorted({e.question for e in (*study.train.examples, *study.held_out.examples)}))
        losses = fit(
            model, Questions(study.train.examples, study.tokenizer), study.train.states[start], schedule,
            settings.output, f"Stage 2: instructions, {method}", encoder=encoder, show=settings.show,
        )  # fmt: skip
    return Trained(model, start, encoder, losses)


def answers(
    study: Study, trained: Trained, title: str, *, blank: bool = False, without_question: bool = False
) -> list[str]:
    """Answers to the held-out questions.

    Args:
        study: The study.
        trained: The model.
        title: Name on the progress bar.
        blank: Show a blank picture instead.
        without_question: Leave the question out.
    """
    pictures = study.held_out.states[trained.start]
    if blank:
        pictures = pictures[-1:].expand_as(pictures)
    with timed(study.seconds, "evaluation"), upper_blocks(trained.model.model.vision_tower, trained.start):
        return answer(
            trained.model, study.tokenizer, study.held_out.examples, pictures, title, encoder=trained.encoder,
            without_question=without_question, show=study.settings.show,
        )  # fmt: skip


def output_folder(settings: MiniSettings) -> Path:
    """The run's folder, made if it is not there."""
    settings.output.mkdir(parents=True, exist_ok=True)
    return settings.output
