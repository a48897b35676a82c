"""What a run of the miniature depends on, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from covft.errors import ConfigError
from study.tasks import TASKS

METHODS = ("frozen", "covft")


@dataclass(frozen=True)
class MiniSettings:
    """Settings of one run; the defaults were found on validation scenes.

    Attributes:
        steps: Steps of stage 2, for each method.
        seed: Seed of the scenes' drawing, the projector, the experts' routers and the order of the data.
        tasks: Names of the tasks, default all.
        method: `frozen`, `covft` or `both`.
        output: Folder for the page, results.json and the saved encoder.
        train_scenes: Scenes to learn from.
        test_scenes: Held-out scenes to answer about.
        test_questions: Most questions per task.
        split: `test`; `validation` when settings are searched.
        batch: Questions per step.
        stage1_steps: Steps of stage 1, the projector alone.
        stage1_lr: Its learning rate.
        projector_lr: Learning rate of the projector in stage 2.
        lr: Learning rate of the language model in stage 2.
        vision_lr: Learning rate of the experts and norms that CoVFT trains.
        router_lr: Learning rate of its routers and contexts.
        layers: Blocks that CoVFT adapts, of six.
        experts: Experts per adapted block.
        routing: How experts are mixed.
        tower_steps: Steps of the packaged backbone's short training; 0 leaves it out.
        tower_layers: Blocks of it that are adapted, of twelve.
        tower_scenes: Scenes that it learns from.
        tower_batch: Questions per step.
        tower_lr: Learning rate of its language model and experts.
        cache: Where the converted backbone is kept, default the user's cache folder.
        show: Whether to show progress bars.
    """

    steps: int = 320
    seed: int = 0
    tasks: tuple[str, ...] = tuple(TASKS)
    method: str = "both"
    output: Path = Path("runs/mini")
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
    tower_steps: int = 30
    tower_layers: tuple[int, ...] = (9, 10)
    tower_scenes: int = 400
    tower_batch: int = 24
    tower_lr: float = 5e-4
    cache: Path | None = None
    show: bool = True

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(
                f"tasks={','.join(self.tasks)} names tasks that the miniature does not have.",
                expected=", ".join(TASKS),
                got=", ".join(unknown) or "none",
                fix="python -m study --tasks caption,grounding",
            )
        if self.method not in (*METHODS, "both"):
            raise ConfigError(
                f"method={self.method!r} is not one of the methods of the miniature.",
                expected="frozen, covft or both",
                got=self.method,
                fix="python -m study --method both",
            )
        if self.steps < 1:
            raise ConfigError("stage 2 needs steps.", expected="steps >= 1", got=self.steps, fix="python -m study")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to run, in order."""
        return METHODS if self.method == "both" else (self.method,)


@dataclass
class MiniResult:
    """What a run measured.

    Attributes:
        scores: Exact match in percent per task, for each method and floor.
        losses: Loss of every step: `stage1`, each method, `backbone`.
        seconds: Wall time of each part.
        checks: Figures of the checks: largest difference after loading, change by wrapping, and the like.
        files: What was written, by name.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def quick_settings(**chosen: object) -> MiniSettings:
    """A run of seconds that goes through every part; its scores mean nothing.

    Args:
        **chosen: Fields of `MiniSettings` that override the small sizes.
    """
    small: dict = {
        "steps": 6,
        "train_scenes": 120,
        "test_scenes": 24,
        "test_questions": 8,
        "batch": 16,
        "stage1_steps": 4,
        "tower_steps": 5,
        "tower_scenes": 24,
        "tower_batch": 8,
    }
    return MiniSettings(**{**small, **chosen})
