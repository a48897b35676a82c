"""Trains covft and full tuning with one seed, and towers of two tasks, and writes what there is to see of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import covft
from covft.integrations.training.updates import UpdateMonitor
from covft.utils.files import write_text
from study.inspection.distance import measure
from study.inspection.look import Looked, Texts, look
from study.runs.build import new_llava
from study.runs.methods import options_of
from study.runs.run import run, versions
from study.runs.settings import RunSettings
from study.towers import small_vit

RESULTS = Path(__file__).parents[1] / "results" / "inspection"
METHODS = ("covft", "full")
SEEDS = 3  # of the distances
EVERY = 2  # steps between gradients that are compared
_OF_RUN = ("settings", "rates", "scores", "trained", "seconds", "device", "versions", "date")


@dataclass
class Updates:
    """Compares the gradients of a training with their dominant direction: all of the tower, and of the FFNs alone.

    Attributes:
        layers: Blocks whose FFNs are compared.
    """

    layers: tuple[int, ...]
    _monitors: dict[str, UpdateMonitor] = field(default_factory=dict)

    def __call__(self, encoder: Any, step: int) -> None:
        """Look at the gradients of a step."""
        if not self._monitors:
            named = dict(encoder.vit.named_parameters())
            mlps = {block.mlp_path for block in encoder.spec.blocks if block.index in self.layers}
            mlps |= {block.output_path for block in encoder.spec.blocks if block.index in self.layers}
            ffns = {n: p for n, p in named.items() if any(path and n.startswith(f"{path}.") for path in mlps)}
            self._monitors = {"tower": UpdateMonitor(named.items(), EVERY), "ffns": UpdateMonitor(ffns.items(), EVERY)}
        for monitor in self._monitors.values():
            monitor.note(step)

    def found(self) -> dict[str, list[float]]:
        """Return the cosines, by what was compared."""
        return {name: np.round(monitor.cosines(), 4).tolist() for name, monitor in self._monitors.items()}


def inspect_runs(
    settings: RunSettings, folder: Path, results: Path = RESULTS, device: str = "cpu", report: Any = None
) -> list[Path]:
    """Train each method, look at it, and write the numbers, a JSON file each; files that are there stay.

    The distances of towers of two tasks follow, a file for each of three seeds.

    Args:
        settings: The run; its method is replaced.
        folder: Where the trained encoder of covft and its recordings go, for `covft report`.
        results: Where the numbers go.
        device: `cpu` or `cuda`.
        report: Called with the number of finished steps, now and then.

    Returns:
        The files.
    """
    files = []
    for method in METHODS:
        own = settings.replace(method=method)
        file = results / f"{own.name}.json"
        files.append(file)
        if file.is_file():
            continue
        updates = Updates(settings.layers or ())
        is_covft = method == "covft"
        row = run(own, device=device, inspect=Looked(folder) if is_covft else None, watch=updates, report=report)
        found = {name: row[name] for name in _OF_RUN} | {"updates": updates.found()}
        if is_covft:
            found |= {"trained_tower": row["inspection"], "untrained_tower": untrained(own)}
        write_text(file, json.dumps(found) + "\n")
    return [*files, *distances(settings, results, device, report)]


def distances(settings: RunSettings, results: Path = RESULTS, device: str = "cpu", report: Any = None) -> list[Path]:
    """Write how far towers of two tasks come apart, a JSON file for each of three seeds; files that are there stay.

    Args:
        settings: The run of the first seed; its method and tasks are replaced.
        results: Where the numbers go.
        device: `cpu` or `cuda`.
        report: Called with the number of finished steps of a training, now and then.

    Returns:
        The files.
    """
    files = []
    for seed in range(settings.seed, settings.seed + SEEDS):
        own = settings.replace(method="full", seed=seed)
        files.append(results / f"distance-{own.name}.json")
        if not files[-1].is_file():
            found = measure(own, device, report) | {"versions": versions()}
            write_text(files[-1], json.dumps(found) + "\n")
    return files


def untrained(settings: RunSettings) -> dict[str, Any]:
    """Look at the tower of a covft before its training: what the same figures show without anything learned."""
    new_llava(settings)  # draws what a run draws first
    torch.manual_seed(settings.seed)
    encoder = covft.wrap(small_vit(), Texts(settings.text_encoder), **options_of(settings))
    return look(encoder.eval(), settings)
