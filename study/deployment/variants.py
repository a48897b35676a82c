"""The forms in which a trained model may be served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import covft
from study.deployment.trained import Deployed, samples_of, spread_rows


@dataclass(frozen=True)
class DeploySettings:
    """Settings of the comparison.

    Attributes:
        calibration: Training questions that the mean routing is taken from, and that are distilled on.
        tested: Held-out questions on which features are compared.
        steps: Steps of distillation.
        lr: Peak learning rate of these.
        batch: Questions per step.
        rank: Rank of compressed experts.
        below: Weight below which experts are skipped.
        seed: Seed of the choice of questions, and of distillation.
    """

    calibration: int = 512
    tested: int = 256
    steps: int = 300
    lr: float = 1e-3
    batch: int = 16
    rank: int = 16
    below: float = 0.1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Variant:
    """A form, and the model in it.

    Attributes:
        name: What the table calls it.
        llava: The model.
        needs_text: Whether its tower has to be told the question.
        report: What `covft.merge` said of it, as JSON values.
    """

    name: str
    llava: Any
    needs_text: bool
    report: dict[str, Any] | None = None


def variants(given: Deployed, settings: DeploySettings) -> list[Callable[[], Variant]]:
    """Return what makes each variant, the mixture first."""
    calibration = samples_of(given.calibration, spread_rows(given.calibration, settings.calibration, settings.seed))
    test = samples_of(given.pictures, spread_rows(given.pictures, settings.tested, settings.seed))

    def mixture() -> Variant:
        return Variant("mixture of experts", given.llava, needs_text=True)

    def merged(steps: int) -> Variant:
        llava, report = covft.merge(
            given.copy(),
            [calibration],
            test=[test],
            distill=steps,
            lr=settings.lr,
            batch_size=settings.batch,
            seed=settings.seed,
        )
        name = f"merge, {steps} steps of distillation" if steps else "merge"
        return Variant(name, llava, needs_text=False, report=report.to_dict())

    def compressed() -> Variant:
        llava = given.copy()
        covft.compress(covft.get_encoder(llava), settings.rank)
        return Variant(f"compress, rank {settings.rank}", llava, needs_text=True)

    def skipped() -> Variant:
        llava = given.copy()
        covft.skip_experts(covft.get_encoder(llava), settings.below)
        return Variant(f"skip_experts, below {settings.below:g}", llava, needs_text=True)

    def untuned() -> Variant:
        return Variant("tower as before tuning", covft.detach(given.copy()), needs_text=False)

    return [mixture, lambda: merged(0), lambda: merged(settings.steps), untuned, compressed, skipped]
