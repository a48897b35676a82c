"""The named studies, as lists of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from covft.errors import ConfigError
from covft.tuning import methods as known_methods
from study.data.tasks import TASKS
from study.runs.settings import CONTROLS, RunSettings

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


def method_runs() -> list[RunSettings]:
    """Return one run for each method of covft.tune, LoRA with two ranks."""
    ranks: dict[str, list[dict]] = {"lora": [{"r": 8}, _rank(LARGE_RANK)], "dora": [{"r": 8}]}
    names = [*known_methods(), "covft"]
    return [RunSettings(method=name, options=options) for name in names for options in ranks.get(name, [{}])]


def _rank(r: int) -> dict[str, float]:
    """Return the options of LoRA with a rank, and the scale that r=8 has."""
    return {"r": r, "alpha": 2.0 * r}


def _controls() -> list[RunSettings]:
    return [RunSettings(control=control) for control in CONTROLS] + [
        RunSettings(method="frozen"),
        RunSettings(method="frozen", control="tower_only"),
    ]


def _context() -> list[RunSettings]:
    contexts = [RunSettings(context=context) for context in ("cve", "image", "text", "concat")]
    return [
        *contexts,
        *(RunSettings(routing=routing) for routing in ("sparse", "random")),
        RunSettings(control="uniform"),
    ]


def _placement() -> list[RunSettings]:
    places = ((0, 1), (1, 2), (2, 3), (3, 4), (4,), (2, 3, 4), (0, 1, 2, 3, 4))
    return [RunSettings(layers=layers) for layers in places]


def _diversity() -> list[RunSettings]:
    names = tuple(TASKS)
    parts = [names[:: len(names) // count or 1][:count] for count in (2, 4, 8)]
    chosen = [part for part in parts if len(part) < len(names)] + [names]
    return [RunSettings(method=method, tasks=part) for part in chosen for method in MAIN] + [
        RunSettings(experts=8, tasks=part) for part in chosen
    ]


def _matched() -> list[RunSettings]:
    """Return methods that train as much of the tower as covft (5.19 million parameters), and covft with less.

    The widths are those of `covft.match(small_vit(), 5185932, [method], text_dim=384)`. No method that only trains the
    tower's own weights can have as many: all of it has 1.03 million.
    """
    matched = {"adaln": {"width": 1927}, "cross_attention": {"width": 1684}, "qa_vit": {"width": 3369}}
    return [
        *(RunSettings(method=method, options=options) for method, options in matched.items()),
        RunSettings(method="lora", options=_rank(375)),
        RunSettings(method="full"),
        *(RunSettings(options={"expert_rank": rank}) for rank in (4, 16)),
        RunSettings(experts=1),
        RunSettings(),
    ]


def _fraction() -> list[RunSettings]:
    steps = RunSettings().steps
    return [
        RunSettings(method=method, fraction=share, steps=round(share * steps))
        for share in (0.25, 0.5, 0.75, 1.0)
        for method in MAIN
    ]


def _start() -> list[RunSettings]:
    starts = [{}, {"expert_init": "noise"}, {"expert_init": "drop"}, {"expert_rank": 16}, {"attention_rank": 8}]
    return [RunSettings(options=options) for options in starts]


def _forgetting() -> list[RunSettings]:
    upstream = tuple(name for name, task in TASKS.items() if task.group in ("general", "knowledge"))
    downstream = tuple(name for name, task in TASKS.items() if task.group == "vision")
    languages = ("full", "lora", "dora", "top_layer", {"method": "last_layers", "n": 2})
    fields = {"tasks": downstream, "upstream": upstream}
    runs = [
        RunSettings(method="frozen", language=language, projector=projector, **fields)
        for language in languages
        for projector in (True, False)
    ]
    towers = [RunSettings(method=method, language="lora", **fields) for method in ("full", "lora", "covft")]
    return [*runs, *towers]


def _tower() -> list[RunSettings]:
    runs = [RunSettings(method=method, tower="backbone") for method in ("frozen", "full")]
    return [*runs, RunSettings(tower="backbone", layers=(8, 9, 10))]


STUDIES: dict[str, Callable[[], list[RunSettings]]] = {
    "methods": method_runs,
    "controls": _controls,
    "context": _context,
    "placement": _placement,
    "experts": lambda: [RunSettings(experts=experts) for experts in (1, 2, 4, 8)],
    "diversity": _diversity,
    "text_encoder": lambda: [RunSettings(text_encoder=name) for name in ("minilm", "bag_of_words", "random")],
    "matched": _matched,
    "fraction": _fraction,
    "tower": _tower,
    "start": _start,
    "tokens": lambda: [RunSettings(method=method, tokens=tokens) for tokens in (36, 9, 4, 1) for method in MAIN],
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
        raise ConfigError("There are no such studies.", expected=", ".join(STUDIES), got=", ".join(unknown))
    default, found = RunSettings().to_dict(), {}
    for study in names:
        for run in STUDIES[study]():
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
