"""Does a diagnosis, made before any training, foretell where covft beats full tuning? From files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covft.errors import CheckpointError
from covft.metrics import holm
from study.results import contrasts
from study.results.contrasts import Estimate
from study.results.formats import NOTHING, Table, interval, p_value
from study.results.studies import TWELVE, Results

ALL = "all tasks"
FOLDER = Path(__file__).parents[1] / "results" / "diagnosis"
FEWEST = 4  # tasks
PERMUTATIONS = 9999
METHODS = {"freeze": "frozen", "tune": "full", "lora": "lora", "context": "covft"}


@dataclass(frozen=True)
class Predictor:
    """A number of a diagnosis about each task.

    Attributes:
        name: Its name in the table.
        about: What it is.
        sign: The sign that its correlation with the gain of covft has if conflict is what covft resolves.
    """

    name: str
    about: str
    sign: int


PREDICTORS = (
    Predictor("alignment", "mean alignment of its gradients with those of each other task", -1),
    Predictor("separation", "mean cosine of its gradients with each other, less that with the other tasks'", 1),
    Predictor("harm", "mean change of its held-out loss by a short training on each other task", 1),
)


@dataclass(frozen=True)
class Agreement:
    """How a predictor goes with the gain of covft over full tuning, over tasks.

    Attributes:
        rho: Spearman's rank correlation.
        p: Two-sided p-value by permutation of the tasks, adjusted for all predictors.
        tasks: Number of tasks that have both.
    """

    rho: float
    p: float
    tasks: int


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """Return the file of a diagnosis.

    Args:
        name: What was diagnosed.
        folder: Where the files are.
    """
    return folder / f"{name.replace(' ', '-')}.json"


def read_diagnosis(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Read a diagnosis that `python -m study diagnose` wrote.

    Args:
        name: What was diagnosed, such as `all tasks`.
        folder: Where to.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    path = path_of(name, folder)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read.",
            got=str(error),
            fix="python -m study diagnose --tasks all --no-halves --samples 560 --output study/results/diagnosis",
        ) from error


def predictions(diagnosis: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return each predictor of each task; NaN where it is not known."""
    conflict, probe = diagnosis["conflict"], diagnosis["probe"]
    tasks = conflict["kinds"]
    cosines = np.array(conflict["cosines"][-1], dtype=float)  # over all blocks
    alignment = np.array(conflict["alignment"][-1], dtype=float)  # None becomes NaN
    found: dict[str, dict[str, float]] = {one.name: {} for one in PREDICTORS}
    for place, task in enumerate(tasks):
        others = [other for other in range(len(tasks)) if other != place]
        known = alignment[place, others]
        found["alignment"][task] = float(np.nanmean(known)) if np.isfinite(known).any() else math.nan
        found["separation"][task] = float(cosines[place, place] - cosines[place, others].mean())
        found["harm"][task] = float(np.mean([probe["alone"][tasks[other]][task]["mean"] for other in others]))
    return found


def agreements(
    predicted: Mapping[str, Mapping[Any, float]], gains: Mapping[Any, float], seed: int = 0
) -> dict[str, Agreement]:
    """Correlate each predictor with the gains over the tasks that have both.

    Args:
        predicted: Each predictor of each task.
        gains: Gain of covft over full tuning, by task.
        seed: Of the permutations.
    """
    found = {}
    for name, values in predicted.items():
        tasks = [task for task in gains if math.isfinite(values.get(task, math.nan))]
        if len(tasks) >= FEWEST:
            found[name] = _correlated([values[task] for task in tasks], [gains[task] for task in tasks], seed)
    adjusted = holm([one.p for one in found.values()])
    return {name: Agreement(one.rho, p, one.tasks) for (name, one), p in zip(found.items(), adjusted, strict=True)}


def _correlated(x: Sequence[float], y: Sequence[float], seed: int) -> Agreement:
    ranks_x, ranks_y = (_standard(_ranks(np.asarray(values))) for values in (x, y))
    rho = float(ranks_x @ ranks_y)
    draws = np.random.default_rng(seed)
    permuted = np.array([ranks_x @ draws.permutation(ranks_y) for _ in range(PERMUTATIONS)])
    beyond = np.count_nonzero(np.abs(permuted) >= abs(rho) - 1e-12)
    return Agreement(rho, float((1 + beyond) / (1 + PERMUTATIONS)), len(x))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks; equal values share their mean rank."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def _standard(ranks: np.ndarray) -> np.ndarray:
    centred = ranks - ranks.mean()
    return centred / (np.linalg.norm(centred) or 1.0)


def gains_of(results: Results) -> dict[str, Estimate]:
    """Return the gain of covft over full tuning on each task, from the rows."""
    covft, full = results.main("covft"), results.main("full")
    if covft is None or full is None:
        return {}
    found = {task: contrasts.difference(covft, full, (task,)) for task in contrasts.common(covft.tasks, full)}
    return {task: value for task, value in found.items() if value is not None}


def task_table(results: Results, diagnosis: dict[str, Any]) -> Table:
    """Tabulate what was measured before any training beside what training gave, task by task."""
    predicted, gains = predictions(diagnosis), gains_of(results)
    table = Table("Before and after", ["task", *(one.name for one in PREDICTORS), "covft − full, points"])
    for task, gain in sorted(gains.items(), key=lambda item: -item[1].value):
        known = [predicted[one.name].get(task, math.nan) for one in PREDICTORS]
        table.rows.append([f"`{task}`", *(_number(value) for value in known), interval(gain)])
    table.notes.append(" ".join(f"*{one.name.capitalize()}*: {one.about}." for one in PREDICTORS))
    return table


def agreement_table(results: Results, diagnosis: dict[str, Any]) -> Table:
    """Tabulate the rank correlation of each predictor with the gain of covft over full tuning."""
    gains = {task: gain.value for task, gain in gains_of(results).items()}
    found = agreements(predictions(diagnosis), gains)
    table = Table("Agreement", ["predictor", "expected", "Spearman's ρ", "p (Holm)", "tasks"], text=frozenset({0, 1}))
    for one in PREDICTORS:
        if one.name in found:
            own = found[one.name]
            expected = "above 0" if one.sign > 0 else "below 0"
            table.rows.append([one.name, expected, _number(own.rho), p_value(own.p), str(own.tasks)])
    table.notes.append(
        f"p is of {PERMUTATIONS:,} permutations of the tasks. Tasks whose gradients have no direction in common with "
        "each other have no alignment."
    )
    return table


def verdict_table(results: Results, diagnosis: dict[str, Any]) -> Table:
    """Tabulate the mean of each method that a verdict may indicate, and which the verdict indicated."""
    choice = diagnosis["verdict"]["choice"]
    table = Table(
        "Verdict", ["verdict", "method", "mean of the twelve", "covft, minus this one"], text=frozenset({0, 1})
    )
    covft = results.main("covft")
    for verdict, method in METHODS.items():
        group = results.main(method)
        if group is None:
            continue
        tasks = contrasts.common(TWELVE, group)
        apart = None if covft is None or group is covft else contrasts.difference(covft, group, tasks)
        mean = interval(contrasts.mean(group, tasks), difference=False)
        if verdict == choice:
            table.strong.add((len(table.rows), 0))
        table.rows.append([verdict, group.label, mean, NOTHING if apart is None else interval(apart)])
    table.notes.append(f"The diagnosis of {ALL} says: {diagnosis['verdict']['words']}")
    return table


def borne_out(results: Results, diagnosis: dict[str, Any]) -> str:
    """Say whether the runs bear out the verdict for all tasks together.

    Args:
        results: The rows.
        diagnosis: Of all tasks.
    """
    choice = diagnosis["verdict"]["choice"]
    ours = results.main(METHODS[choice])
    others = [group for method in METHODS.values() if (group := results.main(method)) not in (None, ours)]
    if ours is None or not others:
        return "The methods were not run."
    found = [contrasts.difference(ours, group, TWELVE) for group in others if group is not None]
    signs = [one.sign for one in found if one is not None]
    said = f"**The verdict for all tasks together, {choice!r}, is"
    if signs and min(signs) > 0:
        said = f"{said} borne out**: {ours.label} beats each of the other three."
    elif signs and min(signs) < 0:
        said = f"{said} not borne out**: another method beats {ours.label}."
    else:
        said = f"{said} neither borne out nor refuted**: not every interval is clear of 0."
    return f"{said} It is one verdict about one set of tasks, so it may be right by luck."


def tables(results: Results, folder: Path = FOLDER) -> list[Table]:
    """Return the tables of the agreement.

    Args:
        results: The rows.
        folder: Where the diagnoses are.

    Raises:
        CheckpointError: If the diagnosis of all tasks is missing.
    """
    diagnosis = read_diagnosis(ALL, folder)
    return [make(results, diagnosis) for make in (verdict_table, agreement_table, task_table)]


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:+.3f}".replace("-", "−")
