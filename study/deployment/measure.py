"""What a variant scores, and what it costs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from study.deployment.trained import Deployed, encoder_of, samples_of, spread_rows
from study.deployment.variants import Variant
from study.results.formats import Table
from study.runs.model import started_at
from study.runs.score import mean_of, percent, score

_AT_ONCE = 16
_REPEATS = 15


def measured(given: Deployed, variant: Variant, tested: int, seed: int, wanted: Tensor | None) -> tuple[dict, Tensor]:
    """Score a variant, and measure its tower.

    Args:
        given: The trained model.
        variant: The variant.
        tested: Held-out questions on which features are compared.
        seed: Seed of their choice.
        wanted: Features of the mixture for these; None if this is the mixture.

    Returns:
        A row of JSON values, and the features.
    """
    encoder = encoder_of(variant.llava)
    model = given.miniature(variant.llava, encoder)
    scored = given.scored if variant.needs_text else replace(given.scored, texts=None)
    with started_at(encoder.vit, given.first):
        scores = percent(score(model, scored)["hits"])
    pictures, texts, tasks = samples_of(given.pictures, spread_rows(given.pictures, tested, seed))
    with torch.no_grad(), started_at(encoder.vit, 0):
        found = torch.cat(
            [model.read(x, t) for x, t in zip(pictures.split(_AT_ONCE), texts.split(_AT_ONCE), strict=True)]
        )
        with FlopCounterMode(display=False) as counter:
            encoder(pictures[:1], texts[:1])
        seconds = _seconds(encoder, pictures[:_AT_ONCE], texts[:_AT_ONCE])
    moved = None if wanted is None else _moved(found, wanted, tasks)
    tower = sum(p.numel() * p.element_size() for p in encoder.vit.parameters())
    row = {
        "name": variant.name,
        "mean": round(mean_of(scores), 4),
        "scores": scores,
        "moved": moved,
        "needs_text": variant.needs_text,
        "gflops": round(counter.get_total_flops() / 1e9, 5),
        "milliseconds": round(1000 * seconds / _AT_ONCE, 4),
        "bytes": tower,
        "report": variant.report,
    }
    return row, found


def _seconds(encoder: Any, pictures: Tensor, texts: Tensor) -> float:
    """Return the CPU time of a call on one thread, the median of some."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    try:
        for _ in range(_REPEATS + 2):
            start = time.thread_time()
            encoder(pictures, texts)
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return sorted(times[2:])[_REPEATS // 2]


def _moved(found: Tensor, wanted: Tensor, tasks: list[str]) -> dict[str, float]:
    """Return the relative error of features, of all questions (`all`) and by task."""
    squares = torch.stack([(found - wanted).square().flatten(1).sum(1), wanted.square().flatten(1).sum(1)])
    rows = {"all": list(range(len(tasks)))}
    for row, task in enumerate(tasks):
        rows.setdefault(task, []).append(row)
    return {name: round(float((squares[0, of].sum() / squares[1, of].sum()).sqrt()), 6) for name, of in rows.items()}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Tabulate the rows."""
    header = ["", "mean accuracy", "features moved", "GFLOPs", "CPU ms", "MB", "tower reads the question"]
    table = Table("Forms of one trained model", header)
    for row in rows:
        moved = "" if row["moved"] is None else f"{100 * row['moved']['all']:.1f}%"
        cells = (f"{row['mean']:.1f}", moved, f"{row['gflops']:.3f}", f"{row['milliseconds']:.2f}")
        table.rows.append([row["name"], *cells, f"{row['bytes'] / 1e6:.1f}", "yes" if row["needs_text"] else "no"])
    return table


def tasks_of(rows: list[dict[str, Any]]) -> Table:
    """Tabulate the accuracy of each task."""
    names = list(rows[0]["scores"])
    table = Table("By task", ["task", *(row["name"] for row in rows)])
    for name in names:
        table.rows.append([name, *(f"{row['scores'][name]:.1f}" for row in rows)])
    return table
