"""Measurements of a run."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from covft.utils.files import write_json
from study.settings import StudySettings


@dataclass
class StudyResult:
    """Measurements of a run.

    Attributes:
        scores: Exact match in percent per task, for each method and baseline.
        losses: Loss of every step: `stage 1`, each method, `backbone`.
        seconds: Wall time of each part.
        checks: Output differences by wrapping and by loading, losses and parameters of the packaged backbone.
        files: Paths of the written files, by name.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def write_result(path: Path, settings: StudySettings, result: StudyResult) -> None:
    """Write the settings, the library versions and the measurements as JSON."""
    record = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        **asdict(result),
    }
    write_json(path, record)
