"""Training of LLaVA with transformers' Trainer: either stage, frozen or wrapped tower."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from study.batches import Collator, Questions
from study.progress import progress_bar

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from covft import ContextEncoder


@dataclass(frozen=True)
class Schedule:
    """Steps, batch size and learning rates of one training.

    Attributes:
        steps: Optimizer steps.
        batch: Questions per step.
        projector_lr: Peak learning rate of the projector.
        lr: Peak learning rate of the language model; None freezes it, as in stage 1.
        vision_lr: Peak learning rate of the experts and norms.
        router_lr: Peak learning rate of the routers and contexts.
        seed: Seed of the data order.
    """

    steps: int
    batch: int
    projector_lr: float
    lr: float | None = None
    vision_lr: float = 0.0
    router_lr: float = 0.0
    seed: int = 0


def fit(
    model: LlavaForConditionalGeneration,
    questions: Questions,
    inputs: torch.Tensor,
    schedule: Schedule,
    folder: Path,
    title: str,
    *,
    encoder: ContextEncoder | None = None,
    show: bool = True,
) -> list[float]:
    """Train in place and return the loss of every step.

    Args:
        model: LLaVA.
        questions: Training questions with their answers.
        inputs: Inputs of the tower, one row per scene.
        schedule: Steps, batch size and learning rates.
        folder: Folder that Trainer may write to.
        title: Title of the progress bar.
        encoder: The wrapped tower, to be trained and conditioned on the questions; None for a frozen one.
        show: Whether to show the progress bar.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    projector, language = model.model.multi_modal_projector, model.model.language_model
    groups = [{"params": list(projector.parameters()), "lr": schedule.projector_lr}]
    if schedule.lr is not None:
        groups.append({"params": list(language.parameters()), "lr": schedule.lr})
    if encoder is not None:
        # before the model is frozen: the groups hold the parameters that require a gradient
        groups += encoder.param_groups(schedule.vision_lr, router_lr=schedule.router_lr, weight_decay=0.01)
    model.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    decay = get_cosine_schedule_with_warmup(optimizer, max(1, schedule.steps // 20), schedule.steps)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch,
        max_grad_norm=1.0,
        seed=schedule.seed,
        data_seed=schedule.seed,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    )
    losses: list[float] = []

    with progress_bar(title, schedule.steps, show) as report:

        class InstructionTrainer(Trainer):
            """Conditions the tower on the batch's questions."""

            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):  # noqa: ANN001, ANN003, ANN202
                asked = inputs.pop("questions")
                with encoder.condition(asked) if encoder is not None else nullcontext():
                    outputs = model(**inputs)
                losses.append(outputs.loss.item())
                report(len(losses), losses[-1])
                return (outputs.loss, outputs) if return_outputs else outputs.loss

        trainer = InstructionTrainer(
            model=model,
            args=arguments,
            train_dataset=questions,
            data_collator=Collator(inputs, model.generation_config.pad_token_id),
            optimizers=(optimizer, decay),
        )
        trainer.remove_callback(PrinterCallback)  # it prints what the bar shows
        trainer.train()
    return losses
