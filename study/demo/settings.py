"""Settings of the demo: which runs, and how small."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covft.errors import ConfigError
from study.runs.plan import Planned
from study.runs.settings import CONTROLS, RunSettings

METHODS = ("frozen", "full", "covft", "covft-shuffled")
SMALLER = {"steps": 180, "train_scenes": 4000}  # so that four runs on two cores end within ten minutes
QUICK = {
    "steps": 2, "first_steps": 2, "batch": 16, "train_scenes": 60, "held_out_scenes": 24, "held_out_questions": 6,
}  # fmt: skip
# the packaged backbone is trained for a few steps, without a first stage, so the projector has the rate of that
BACKBONE = {
    "tower": "backbone", "layers": (9, 10), "tokens": 36, "steps": 20, "first_steps": 0, "batch": 24,
    "train_scenes": 120, "projector_lr": 6e-3, "lr": 5e-4, "vision_lr": 5e-4, "router_lr": 2e-4,
}  # fmt: skip


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    Attributes:
        methods: What is trained: a method of `covft.tune`, or `METHOD-CONTROL` with a control of the study.
        output: Folder for the page, the rows and the encoder.
        fields: Fields of `RunSettings` that all runs have.
        backbone: Fields of the check of the packaged backbone.
        show: Whether to show progress bars.
    """

    methods: tuple[str, ...] = METHODS
    output: Path = Path("runs/study")
    fields: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    show: bool = True

    def __post_init__(self) -> None:
        from covft.tuning import methods

        known = ("covft", *methods())
        for name in self.methods:
            method, _, control = name.partition("-")
            if method not in known or control not in ("", *CONTROLS):
                raise ConfigError(
                    f"methods={','.join(self.methods)} names what the study does not have.",
                    expected=f"METHOD or METHOD-CONTROL, of {', '.join(known)} and {', '.join(CONTROLS)}",
                    got=name,
                    fix=f"python -m study --methods {','.join(METHODS)}",
                )
        if len(set(self.methods)) < max(1, len(self.methods)):
            raise ConfigError(
                "The demo needs methods that differ.", expected=",".join(METHODS), got=",".join(self.methods) or "none"
            )
        self.runs()

    @classmethod
    def quick(cls, **given: Any) -> DemoSettings:
        """Return settings that run every part in seconds; the scores mean nothing.

        Args:
            **given: Fields to set otherwise; those of `fields` are added to the small ones.
        """
        fields = {**QUICK, **given.pop("fields", {})}
        return cls(fields=fields, backbone={"steps": 3, "batch": 8, "train_scenes": 24}, **given)

    def runs(self) -> dict[str, RunSettings]:
        """Return the run of each method.

        Raises:
            ConfigError: If a field cannot work.
        """
        found = {}
        for name in self.methods:
            method, _, control = name.partition("-")
            given = {**SMALLER, **self.fields}
            found[name] = RunSettings.from_dict({**given, "method": method, "control": control or "none"})
        return found

    def planned(self) -> list[Planned]:
        """Return the runs, the longest first."""
        return sorted((Planned(run, ("demo",)) for run in self.runs().values()), key=lambda one: -one.cost)

    def backbone_run(self) -> RunSettings:
        """Return the settings of the check of the packaged backbone."""
        first = next(iter(self.runs().values()))
        shared = {"tasks": first.tasks, "seed": first.seed}
        return RunSettings.from_dict({**BACKBONE, **self.backbone, **shared})


def label_of(run: RunSettings) -> str:
    """Return what tables call a run: its method and control, since nothing else differs."""
    return RunSettings(method=run.method, control=run.control).label
