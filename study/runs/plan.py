"""The named studies, as lists of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from covft.errors import ConfigError
from covft.tuning import methods as known_methods
from study.data.tasks import TASKS
from study.runs.settings import CONTROLS, RunSettings
from study.runs.sizes import SIZES, size_named

LARGE_RANK = 64
MAIN = ("frozen", "full", "covft")
# CPU time of a step relative to that of full, on one core
_COST = {"covft": 2.9, "cross_attention": 1.9, "qa_vit": 1.8, "adaln": 1.5, "dora": 1.2, "frozen": 0.8, "q_moe": 0.9}


@dataclass(frozen=True)
class Planned:
    """A run, and the studies that it belongs to."""

    run: RunSettings
    studies: tuple[str, ...]

    @property
    def cost(self) -> float:
        """About how long it takes, relative to others."""
        steps = self.run.steps * (2 if self.run.upstream else 1)
        steps *= 6 if self.run.tower == "backbone" else 1
        return steps * _COST.get(self.run.method, 1.0) * (0.5 + self.run.tokens / 8) * (0.5 + self.run.experts / 8)


def method_runs(size: str = "small") -> list[RunSettings]:
    """Return one run of a size for each method of covft.tune, LoRA with two ranks."""
    new = _new(size)
    wide = {"r": LARGE_RANK, "alpha": 2.0 * LARGE_RANK}  # the scale that r=8 has
    ranks: dict[str, list[dict]] = {"lora": [{"r": 8}, wide], "dora": [{"r": 8}]}
    names = [*known_methods(), "covft"]
    return [new(method=name, options=options) for name in names for options in ranks.get(name, [{}])]


def _new(size: str) -> Callable[..., RunSettings]:
    return partial(RunSettings, size=size)


def _controls(size: str) -> list[RunSettings]:
    new = _new(size)
    return [new(control=control) for control in CONTROLS] + [
        new(method="frozen"),
        new(method="frozen", control="tower_only"),
    ]


def _context(size: str) -> list[RunSettings]:
    new = _new(size)
    contexts = [new(context=context) for context in ("cve", "image", "text", "concat")]
    return [
        *contexts,
        *(new(routing=routing) for routing in ("sparse", "random")),
        new(control="uniform"),
    ]


def _placement(size: str) -> list[RunSettings]:
    new = _new(size)
    return [new(layers=layers) for layers in SIZES[size].placements]


def _diversity(size: str) -> list[RunSettings]:
    new = _new(size)
    names = tuple(TASKS)
    parts = [names[:: len(names) // count or 1][:count] for count in (2, 4, 8)]
    chosen = [part for part in parts if len(part) < len(names)] + [names]
    return [new(method=method, tasks=part) for part in chosen for method in MAIN] + [
        new(experts=8, tasks=part) for part in chosen
    ]


def _matched(size: str) -> list[RunSettings]:
    """Return methods that train as much of the tower as covft, and covft with less.

    At the small size no method that only trains the tower's own weights can have as many: there are 1.03 million, and
    covft trains 5.19. At the large size there are 22.1, and covft trains 20.0.
    """
    new = _new(size)
    return [
        *(new(**fields) for fields in SIZES[size].matched),
        new(method="full"),
        *(new(options={"expert_rank": rank}) for rank in (4, 16)),
        new(experts=1),
        new(),
    ]


def _fraction(size: str) -> list[RunSettings]:
    new = _new(size)
    steps = new().steps
    return [
        new(method=method, fraction=share, steps=round(share * steps))
        for share in (0.25, 0.5, 0.75, 1.0)
        for method in MAIN
    ]


def _start(size: str) -> list[RunSettings]:
    new = _new(size)
    starts = [{}, {"expert_init": "noise"}, {"expert_init": "drop"}, {"expert_rank": 16}, {"attention_rank": 8}]
    return [new(options=options) for options in starts]


def _forgetting(size: str) -> list[RunSettings]:
    new = _new(size)
    upstream = tuple(name for name, task in TASKS.items() if task.group in ("general", "knowledge"))
    downstream = tuple(name for name, task in TASKS.items() if task.group == "vision")
    languages = ("full", "lora", "dora", "top_layer", {"method": "last_layers", "n": 2})
    fields = {"tasks": downstream, "upstream": upstream}
    runs = [
        new(method="frozen", language=language, projector=projector, **fields)
        for language in languages
        for projector in (True, False)
    ]
    towers = [new(method=method, language="lora", **fields) for method in ("full", "lora", "covft")]
    return [*runs, *towers]


def _tower(size: str) -> list[RunSettings]:
    new = _new(size)
    return [new(**fields) for fields in SIZES[size].another_tower]


STUDIES: dict[str, Callable[[str], list[RunSettings]]] = {
    "methods": method_runs,
    "controls": _controls,
    "context": _context,
    "placement": _placement,
    "experts": lambda size: [_new(size)(experts=experts) for experts in (1, 2, 4, 8)],
    "diversity": _diversity,
    "text_encoder": lambda size: [_new(size)(text_encoder=name) for name in ("minilm", "bag_of_words", "random")],
    "matched": _matched,
    "fraction": _fraction,
    "tower": _tower,
    "start": _start,
    "tokens": lambda size: [_new(size)(method=method, tokens=tokens) for tokens in (36, 9, 4, 1) for method in MAIN],
    "forgetting": _forgetting,
}


def plan(
    studies: Iterable[str], seeds: Iterable[int], methods: Iterable[str] | None = None, **fields: object
) -> list[Planned]:
    """Return the runs of some studies, the longest first, each once.

    Args:
        studies: Names in `STUDIES`.
        seeds: Seeds of each run.
        methods: Keep the runs of these methods; None keeps all.
        **fields: Fields of `RunSettings` that all runs have; those that a study varies are left to it.

    Raises:
        ConfigError: If there is no such study or field.
    """
    names = tuple(studies)
    if unknown := [name for name in names if name not in STUDIES]:
        raise ConfigError(
            f"{', '.join(unknown)}: not the name of a study.", expected=", ".join(STUDIES), got=", ".join(unknown)
        )
    size = size_named(str(fields.get("size", "small"))).name
    default, found = RunSettings(size=size).to_dict(), {}
    for study in names:
        for run in STUDIES[study](size):
            if methods is not None and run.method not in methods:
                continue
            own = {name: value for name, value in run.to_dict().items() if value != default[name]}
            if "steps" in own and "steps" in fields:  # a share of all
                own["steps"] = max(1, round(run.fraction * int(str(fields["steps"]))))
            for seed in seeds:
                settings = run.replace(**{**fields, **own, "seed": seed})
                known = found.setdefault(settings.name, Planned(settings, ()))
                found[settings.name] = Planned(settings, (*known.studies, study))
    return sorted(found.values(), key=lambda planned: -planned.cost)
