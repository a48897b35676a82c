"""Learning rates on validation scenes: the same small search for every method."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from covft.utils.files import write_json
from study.runs.plan import Planned, method_runs
from study.runs.rows import Rows
from study.runs.score import mean_of
from study.runs.settings import RATES, RunSettings, chosen_rates

SEARCHED = "python -m study search --choose"


def grid(methods: Iterable[str] | None, fields: Mapping[str, Sequence[Any]], seeds: Iterable[int]) -> list[Planned]:
    """Return a run for each method, seed and combination of values, on validation scenes.

    Args:
        methods: Their names; None for all. LoRA comes with two ranks.
        fields: Values of fields of `RunSettings`; of the size, one.
        seeds: Seeds.
    """
    values_of = dict(fields)
    size = str(values_of.pop("size", ["small"])[0])
    bases = [run for run in method_runs(size) if methods is None or run.method in methods]
    found: dict[str, RunSettings] = {}
    for base, seed in itertools.product(bases, seeds):
        for values in itertools.product(*values_of.values()):
            chosen = dict(zip(values_of, values, strict=True))
            if base.method == "frozen":
                chosen.pop("vision_lr", None)  # it trains nothing of the tower
            run = base.replace(**chosen, split="validation", seed=seed)
            found[run.name] = run
    return sorted((Planned(run, ("search",)) for run in found.values()), key=lambda one: -one.cost)


def choose_rates(rows: Rows, size: str) -> dict[str, float]:
    """Choose the rate with the best mean on validation scenes for each method, and write all to `rates.json`.

    Rows that differ from the study of methods in more than the rate and the seed are left out: a rate that suits other
    steps, another tower or a wider variant is not the rate of the method.

    Args:
        rows: Rows of a search.
        size: The size that they are of.
    """
    compared = {run.name for run in method_runs(size)}
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows.read():
        settings = row["settings"]
        if row["split"] != "validation" or settings["vision_lr"] is None:
            continue
        if RunSettings.from_dict(settings).of_method().name in compared:
            rates = found.setdefault(settings["method"], {})
            rates.setdefault(settings["vision_lr"], []).append(mean_of(row["scores"]))
    best = {method: max(rates, key=lambda rate: sum(rates[rate]) / len(rates[rate])) for method, rates in found.items()}
    known = json.loads(RATES.read_text())
    of_size = {"about": SEARCHED, "vision_lr": {**known[size]["vision_lr"], **best}}
    write_json(RATES, {**known, size: of_size})
    chosen_rates.cache_clear()
    return best
