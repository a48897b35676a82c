"""Settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from covft.errors import ConfigError
from study.data.tasks import TASKS

METHODS = ("frozen", "covft")


@dataclass(frozen=True)
class StudySettings:
    """Settings of a run; the defaults were tuned on validation scenes.

    Attributes:
        steps: Steps of stage 2, for each method.
        seed: Seed of the scenes, the projector, the contexts and routers, and the data order.
        tasks: Names of the tasks; all by default.
        method: `frozen`, `covft` or `both`.
        output: Folder for the report, results.json and the saved encoder.
        train_scenes: Training scenes.
        test_scenes: Held-out scenes.
        test_questions: Maximum number of held-out questions per task.
        split: Split of the held-out scenes: `test`, or `validation` for tuning these settings.
        batch: Questions per step.
        stage1_steps: Steps of stage 1, which trains only the projector.
        stage1_lr: Learning rate of the projector in stage 1.
        projector_lr: Learning rate of the projector in stage 2.
        lr: Learning rate of the language model in stage 2.
        vision_lr: Learning rate of the experts and norms.
        router_lr: Learning rate of the routers and contexts.
        layers: Adapted blocks of the small ViT, which has six.
        experts: Experts per adapted block.
        routing: `dense`, `sparse`, `uniform` or `random`.
        backbone_steps: Training steps of the packaged backbone; 0 skips it.
        backbone_layers: Adapted blocks of the packaged backbone, which has twelve.
        backbone_scenes: Training scenes of the packaged backbone.
        backbone_batch: Questions per step of the packaged backbone.
        backbone_lr: Learning rate of the language model, experts and norms with the packaged backbone.
        cache: Folder for the converted backbone; by default in the user's cache folder.
        show: Whether to show progress bars.
    """

    steps: int = 320
    seed: int = 0
    tasks: tuple[str, ...] = tuple(TASKS)
    method: str = "both"
    output: Path = Path("runs/study")
    train_scenes: int = 4000
    test_scenes: int = 400
    test_questions: int = 200
    split: str = "test"
    batch: int = 64
    stage1_steps: int = 200
    stage1_lr: float = 6e-3
    projector_lr: float = 3e-3
    lr: float = 7e-4
    vision_lr: float = 2e-3
    router_lr: float = 2e-4
    layers: tuple[int, ...] = (2, 3, 4)
    experts: int = 4
    routing: str = "dense"
    backbone_steps: int = 30
    backbone_layers: tuple[int, ...] = (9, 10)
    backbone_scenes: int = 400
    backbone_batch: int = 24
    backbone_lr: float = 5e-4
    cache: Path | None = None
    show: bool = True

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(
                f"tasks={','.join(self.tasks)} names tasks that the study does not have.",
                expected=", ".join(TASKS),
                got=", ".join(unknown) or "none",
                fix="python -m study --tasks caption,grounding",
            )
        if self.method not in (*METHODS, "both"):
            raise ConfigError(
                f"method={self.method!r} is not a method of the study.",
                expected="frozen, covft or both",
                got=self.method,
                fix="python -m study --method both",
            )
        if self.steps < 1:
            raise ConfigError(
                f"steps={self.steps} leaves nothing to train in stage 2.",
                expected="steps >= 1",
                got=self.steps,
                fix="python -m study --steps 320",
            )

    @classmethod
    def quick(cls, **overrides: object) -> StudySettings:
        """Return settings that run every part in seconds; the scores mean nothing.

        Args:
            **overrides: Fields to set otherwise.
        """
        small: dict = {
            "steps": 6,
            "train_scenes": 120,
            "test_scenes": 24,
            "test_questions": 8,
            "batch": 16,
            "stage1_steps": 4,
            "backbone_steps": 5,
            "backbone_scenes": 24,
            "backbone_batch": 8,
        }
        return cls(**{**small, **overrides})

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to run, in order."""
        return METHODS if self.method == "both" else (self.method,)
