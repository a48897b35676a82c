"""Both stages of LLaVA with transformers' Trainer, for a frozen tower and for one with CoVFT."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from study.batches import Collator, Questions
from study.progress import bar

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from covft import ContextEncoder


@dataclass(frozen=True)
class Schedule:
    """One training: how long, with how many questions per step, and how fast each part learns.

    Attributes:
        steps: Optimizer steps.
        batch: Questions per step.
        projector_lr: Highest learning rate of the projector.
        lr: Highest learning rate of the language model; None leaves it frozen, which is stage 1.
        vision_lr: Highest learning rate of the experts and norms of the tower.
        router_lr: Highest learning rate of its routers and contexts.
        seed: Seed of the order of the data.
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
    pictures: torch.Tensor,
    schedule: Schedule,
    folder: Path,
    title: str,
    *,
    encoder: ContextEncoder | None = None,
    show: bool = True,
) -> list[float]:
    """Train in place and return the loss of every step.

    Args:
        model: LLaVA; its tower takes rows of `pictures`.
        questions: What to learn from.
        pictures: One row per scene.
        schedule: How.
        folder: Where Trainer may write.
        title: Name on the progress bar.
        encoder: The wrapped tower, if it is to be trained; the questions condition it.
        show: Whether to show the bar.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    projector, language = model.model.multi_modal_projector, model.model.language_model
    groups = [{"params": list(projector.parameters()), "lr": schedule.projector_lr}]
    if schedule.lr is not None:
        groups.append({"params": list(language.parameters()), "lr": schedule.lr})
    if encoder is not None:
        # asked before everything is frozen: what is trained is what is marked
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

    with bar(title, schedule.steps, show) as report:

        class InstructionTrainer(Trainer):
            """Opens the tower's context around each forward."""

            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):  # noqa: ANN001, ANN003, ANN202
                asked = inputs.pop("questions")
                with encoder.condition(asked) if encoder is not None else nullcontext():
                    outputs = model(**inputs)
                losses.append(outputs.loss.item())
                report(len(losses) - 1, losses[-1])
                return (outputs.loss, outputs) if return_outputs else outputs.loss

        trainer = InstructionTrainer(
            model=model,
            args=arguments,
            train_dataset=questions,
            data_collator=Collator(pictures, model.generation_config.pad_token_id),
            optimizers=(optimizer, decay),
        )
        trainer.remove_callback(PrinterCallback)  # the bar says it all
        trainer.train()
    return losses
