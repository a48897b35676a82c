"""Settings of a run, its name and its label."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from covft.errors import ConfigError
from study.data.tasks import TASKS
from study.runs.sizes import size_named

CONTROLS = {
    "none": "",
    "shuffled": "texts shuffled",
    "shuffled_eval": "texts shuffled in evaluation",
    "generic": "one text for all",
    "blank": "no text (zeros)",
    "oracle": "text = name of the task",
    "uniform": "uniform routing",
    "tower_only": "question to the tower only",
}
TEXT_ENCODERS = ("minilm", "bag_of_words", "random")
TOWERS = ("small_vit", "backbone")
TOKENS = (36, 9, 4, 1)
PRECISIONS = ("float32", "bfloat16")
_OF_SIZE: Any = object()  # stands for the default of the size
_LABELS: dict[str, Callable[[Any], str]] = {
    "control": lambda value: CONTROLS[value],
    "tokens": lambda value: f"{value} token" + ("s" if value > 1 else ""),
    "fraction": lambda value: f"{value:.0%} of the data",
    "experts": lambda value: f"{value} expert" + ("s" if value > 1 else ""),
    "routing": lambda value: f"{value} routing",
    "projector": lambda value: "projector trained" if value else "projector frozen",
    "layers": lambda value: "all blocks" if value is None else f"blocks {_shown(value)}",
}
RATES = Path(__file__).with_name("rates.json")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run. Some defaults depend on the size, and stand in `study.runs.sizes`.

    Attributes:
        size: `small`, or `large`: which tower, language model and tokenizer.
        method: A method of `covft.tune`.
        options: Options of the method that are not fields of their own here.
        control: What is done to the texts, or to the routing: a name in `CONTROLS`.
        tokens: Tokens per picture that the language model gets.
        layers: Blocks of the tower that are tuned, by methods that take them.
        experts: Experts per block (covft).
        routing: Routing (covft).
        context: What the router sees (covft).
        text_encoder: `minilm`, `bag_of_words` or `random`.
        tower: `small_vit`, or `backbone`: the packaged backbone.
        language: How the language model is tuned: `language=` of `covft.tune`.
        projector: Whether the projector is trained.
        tasks: Tasks that are trained and scored; all by default.
        upstream: Tasks that are trained first, with a frozen tower, and scored before and after.
        fraction: Share of the training scenes.
        steps: Steps of training.
        batch: Questions per step.
        per_picture: Questions about one picture in a batch.
        first_steps: Steps of the projector alone, on captions, from which all methods start.
        first_lr: Learning rate of these.
        lr: Peak learning rate of the language model.
        projector_lr: Peak learning rate of the projector.
        vision_lr: Peak learning rate of the tower; None takes the one that the search has found for the method.
        router_lr: Peak learning rate of routers and contexts (covft); None takes `vision_lr` / 10.
        precision: `float32`, or `bfloat16`: autocast; the weights stay float32.
        seed: Seed of the projector, the method's weights and the order of training.
        split: Scenes that are scored: `test`, or `validation`.
        train_scenes: Training scenes.
        held_out_scenes: Scenes that are scored.
        held_out_questions: Questions per task that are scored, at most.
    """

    size: str = "small"
    method: str = "covft"
    options: dict[str, Any] = field(default_factory=dict)
    control: str = "none"
    tokens: int = _OF_SIZE
    layers: tuple[int, ...] | None = _OF_SIZE
    experts: int = 4
    routing: str = "dense"
    context: str = "cve"
    text_encoder: str = "minilm"
    tower: str = _OF_SIZE
    language: Any = "full"
    projector: bool = True
    tasks: tuple[str, ...] = tuple(TASKS)
    upstream: tuple[str, ...] = ()
    fraction: float = 1.0
    steps: int = _OF_SIZE
    batch: int = _OF_SIZE
    per_picture: int = 4
    first_steps: int = _OF_SIZE
    first_lr: float = _OF_SIZE
    lr: float = _OF_SIZE
    projector_lr: float = _OF_SIZE
    vision_lr: float | None = None
    router_lr: float | None = None
    precision: str = "float32"
    seed: int = 0
    split: str = "test"
    train_scenes: int = 6000
    held_out_scenes: int = 500
    held_out_questions: int = 300

    def __post_init__(self) -> None:
        for name, value in size_named(self.size).defaults.items():
            if getattr(self, name) is _OF_SIZE:
                object.__setattr__(self, name, value)
        for name in ("tasks", "upstream", "layers"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.method == "none":
            object.__setattr__(self, "method", "frozen")
        self._check_choice("control", tuple(CONTROLS))
        self._check_choice("text_encoder", TEXT_ENCODERS)
        self._check_choice("tower", TOWERS)
        self._check_choice("tokens", TOKENS)
        self._check_choice("split", ("test", "validation"))
        self._check_choice("precision", PRECISIONS)
        unknown = [name for name in (*self.tasks, *self.upstream) if name not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(
                "These are not tasks of the study.", expected=", ".join(TASKS), got=", ".join(unknown) or "none"
            )
        for name in ("steps", "batch", "per_picture", "train_scenes", "held_out_scenes", "held_out_questions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small.", expected=f"{name} >= 1")
        if self.batch % self.per_picture:
            raise ConfigError(
                f"batch={self.batch} questions are not per_picture={self.per_picture} for each of its pictures.",
                expected="a multiple of per_picture",
                got=self.batch,
            )
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction={self.fraction} is not a share.", expected="0 < fraction <= 1")
        if self.control == "uniform" and self.method != "covft":
            raise ConfigError("Only covft has routing.", expected="method='covft'", got=self.method)

    def _check_choice(self, name: str, choices: tuple) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(
                f"{name}={value!r} is not known.", expected=" | ".join(map(str, choices)), got=repr(value),
                fix=f"{name}={choices[0]!r}",
            )  # fmt: skip

    @property
    def name(self) -> str:
        """What differs from the defaults, and the seed: unique, and the name of the row's file."""
        default = RunSettings(size=self.size)
        parts = [self.method]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in ("method", "size", "seed") or value == getattr(default, item.name):
                continue
            parts.append(value if item.name in ("control", "split") else _short(item.name, value))
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def label(self) -> str:
        """What tables call it: all that differs from the defaults, but the seed and the split."""
        default = RunSettings(size=self.size)
        parts = [self.method]
        for item in dataclasses.fields(self):
            name, value = item.name, getattr(self, item.name)
            if name in ("method", "size", "seed", "split", "upstream") or value == getattr(default, name):
                continue
            if name in _LABELS:
                parts.append(_LABELS[name](value))
            elif name == "options":
                parts += [f"{key}={_shown(entry)}" for key, entry in value.items()]
            elif name == "tasks":
                parts.append("downstream tasks" if self.upstream else f"{len(value)} tasks")
            else:
                parts.append(f"{name.replace('_', ' ')} {_shown(value)}")
        if self.fraction != 1:  # which says how many steps
            parts = [part for part in parts if part != f"steps {self.steps}"]
        return ", ".join(parts)

    @property
    def scored(self) -> tuple[str, ...]:
        """All tasks that are scored."""
        return tuple(name for name in TASKS if name in (*self.tasks, *self.upstream))

    def rates(self) -> tuple[float, float]:
        """Return the learning rates of the tower, and of routers and contexts."""
        vision = self.vision_lr
        if vision is None:
            known = chosen_rates(self.size)
            vision = known.get(self.method, known["default"])
        return vision, vision / 10 if self.router_lr is None else self.router_lr

    def of_method(self) -> RunSettings:
        """Return the run that a search varies: at the rate of its method, on test scenes, with the first seed."""
        return self.replace(vision_lr=None, split="test", seed=0)

    def replace(self, **fields: Any) -> RunSettings:
        """Return these settings with other values for some fields.

        Raises:
            ConfigError: If a name is not a field, or a value cannot work.
        """
        return RunSettings.from_dict({**self.to_dict(), **fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RunSettings:
        """Make settings of JSON values; the inverse of `to_dict`.

        Raises:
            ConfigError: If a name is not a field, or a value cannot work.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigError(
                f"A run has no setting {', '.join(unknown)}.", expected=", ".join(known), got=", ".join(unknown)
            )
        return cls(**fields)


@lru_cache
def chosen_rates(size: str) -> dict[str, float]:
    """Return the tower's learning rate for each method, as `python -m study search` has found it for a size."""
    return json.loads(RATES.read_text())[size]["vision_lr"]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(v) if k == "method" else f"{k}={_shown(v)}" for k, v in value.items())
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(name: str, value: Any) -> str:
    """Return a field for a file name."""
    if name == "options":
        return "-".join(f"{key}{_shown(entry)}" for key, entry in value.items()).replace(" ", "_")
    shown = _shown(value)
    if len(shown) > 24:
        shown = hashlib.sha256(shown.encode()).hexdigest()[:6]
    return f"{name}{shown}".replace(",", "").replace(" ", "_")
