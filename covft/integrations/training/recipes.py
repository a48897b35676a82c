"""The published training recipes: trained parts, learning rates, batch sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from covft.utils.transformers_names import counts_warmup_in_steps, training_field


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    Attributes:
        name: Such as `llava-finetune`.
        parts: Trained parts, for `train_only`.
        settings: Fields of `MLLMTrainingArguments` that every release of transformers has.
        source: Where the values come from.
        recompute: Whether activations are recomputed in backward.
    """

    name: str
    parts: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    recompute: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Fields of `MLLMTrainingArguments`, as the installed release of transformers names them."""
        arguments = {**self.settings, training_field(): True} if self.recompute else dict(self.settings)
        if counts_warmup_in_steps():
            arguments["warmup_ratio"] = arguments.pop("warmup_steps")
        return arguments

    def describe(self, training: Any = None) -> str:
        """List the hyperparameters, one per line.

        Args:
            training: The `MLLMTrainingArguments` of a run, whose values are shown next to those that they override.
        """
        lines = [f"{self.name}: {self.source}"]
        for name, value in self.arguments.items():
            used = getattr(training, name, value)
            used = getattr(used, "value", used)  # of an enumeration
            lines.append(f"  {name:<26} {used}{'' if used == value else f'  (recipe: {value})'}")
        return "\n".join(lines)


_COSINE: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a fraction of all steps
    "bf16": True,
    "remove_unused_columns": False,
    "seed": 42,
}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "llava-pretrain",
            ("projector",),
            {**_COSINE, "learning_rate": 1e-3, "global_batch_size": 256, "weight_decay": 0.0},
            "CoVFT paper, section 4.1, and LLaVA-1.5: 558K captions, projector only",
        ),
        Recipe(
            "llava-finetune",
            ("projector", "llm", "covft"),
            {
                **_COSINE,
                "learning_rate": 2e-5,
                "global_batch_size": 128,
                "weight_decay": 0.0,
                "group_by_modality_length": True,
            },
            "CoVFT paper, section 4.1, and LLaVA-1.5: 665K instructions",
            recompute=True,
        ),
        Recipe(
            "internvl-pretrain",
            ("projector",),
            {**_COSINE, "learning_rate": 2e-4, "global_batch_size": 512, "weight_decay": 0.05},
            "InternVL 2.5, the MLP warm-up",
        ),
        Recipe(
            "internvl-finetune",
            ("projector", "llm", "covft"),
            {
                **_COSINE,
                "learning_rate": 4e-5,
                "global_batch_size": 128,
                "weight_decay": 0.05,
                "group_by_modality_length": True,
            },
            "InternVL's published fine-tuning scripts",
            recompute=True,
        ),
    )
}
