"""Reads what a folder has to report: settings, curves, recordings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from covft.analysis.recording import FILE, Recording
from covft.analysis.report.diagnosis import FILE as DIAGNOSIS_FILE
from covft.analysis.stats.attention import ATTENTION_FILE, QUESTIONS_FILE, AttentionMaps, QuestionMaps
from covft.errors import CheckpointError

Stored = TypeVar("Stored")


@dataclass(frozen=True)
class Curve:
    """A figure over the steps of a training.

    Attributes:
        name: Its name in the log.
        steps: Optimizer steps.
        values: Its value at each of them.
    """

    name: str
    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Facts:
    """What a folder has to report.

    Attributes:
        folder: The folder.
        settings: Settings of the encoder; empty where there is none.
        curves: Figures of the training.
        recording: Of `record`; None without one.
        attention: Of `attention_maps`; None without them.
        questions: Of `compare_questions`; None without them.
        diagnosis: A diagnosis, as JSON; None without one.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    recording: Recording | None = None
    attention: AttentionMaps | None = None
    questions: QuestionMaps | None = None
    diagnosis: Any = None

    def __bool__(self) -> bool:
        """Whether there is anything."""
        found = (self.settings, self.curves, self.recording, self.attention, self.questions, self.diagnosis)
        return any(map(bool, found))


def gather(folder: Path) -> Facts:
    """Read a folder: an encoder that was saved, the output of a trainer, or where recordings were saved.

    Settings and curves are those of the folder, of its `covft/`, or of its latest checkpoint.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: If there is no such folder, nothing in it to report, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.", expected="a folder of an encoder, a run or recordings")
    latest = sorted(folder.glob("checkpoint-*"), key=_step)[-1:]
    places = [folder, folder / "covft", *latest, *(place / "covft" for place in latest)]
    facts = Facts(
        folder,
        _settings(_first(places, "covft_config.json")),
        _curves(_first(places, "trainer_state.json")),
        _stored(folder / FILE, Recording.load),
        _stored(folder / ATTENTION_FILE, AttentionMaps.load),
        _stored(folder / QUESTIONS_FILE, QuestionMaps.load),
        _first([folder], DIAGNOSIS_FILE),
    )
    if not facts:
        raise CheckpointError(
            f"{folder} has nothing to report.",
            expected="covft_config.json, trainer_state.json, "
            f"{FILE}, {ATTENTION_FILE}, {QUESTIONS_FILE} or {DIAGNOSIS_FILE}",
            got=", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder",
            fix="covft.analysis.record(model, data).save(folder)",
        )
    return facts


def _step(path: Path) -> int:
    number = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(number[1]) if number else -1


def _first(places: list[Path], name: str) -> Any:
    for place in places:
        if (place / name).is_file():
            try:
                return json.loads((place / name).read_text(encoding="utf-8"))
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{place / name} cannot be read.", got=str(error)) from error
    return None


def _stored(path: Path, load: Callable[[Path], Stored]) -> Stored | None:
    return load(path.parent) if path.is_file() else None


def _settings(content: Any) -> dict[str, Any]:
    """Return the settings of a saved encoder, one level deep."""
    if not isinstance(content, dict):
        return {}
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if value is not None}


def _curves(content: Any) -> tuple[Curve, ...]:
    """Return every figure of a trainer's log that has two entries or more."""
    log = content.get("log_history", []) if isinstance(content, dict) else []
    found: dict[str, Curve] = {}
    for entry in log:
        step: Any = entry.get("step") if isinstance(entry, dict) else None
        for name, value in entry.items() if _is_number(step) else ():
            if name not in ("step", "epoch") and _is_number(value):
                curve = found.setdefault(name, Curve(name, [], []))
                curve.steps.append(step)
                curve.values.append(value)
    return tuple(curve for curve in found.values() if len(curve.steps) > 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
