"""Rows of the study with planted scores: what tables and verdicts have to find is known."""

import json
import zlib

import numpy as np

GROUPS = {
    "general": ("existence", "choice", "choice_german", "attributes"),
    "knowledge": ("word", "digit", "diagram"),
    "vision": ("pairs", "photo", "count", "relation", "size"),
}
TWELVE = tuple(task for tasks in GROUPS.values() for task in tasks)
DEFAULTS = {
    "size": "small", "method": "covft", "options": {}, "control": "none", "tokens": 4, "layers": [2, 3, 4],
    "experts": 4, "routing": "dense", "context": "cve", "text_encoder": "minilm", "language": "full",
    "projector": True, "tasks": list(TWELVE), "fraction": 1.0, "steps": 100, "held_out_questions": 100,
}  # fmt: skip


def percents(mean, vision=0.0, **tasks):
    """Return percents of the twelve tasks: all `mean`, those of vision higher, some given."""
    return {task: mean + vision * (task in GROUPS["vision"]) for task in TWELVE} | tasks


def planted(label, scores, studies, seeds=(0, 1, 2), noise=0.3, questions=100, **settings):
    """Return rows, one per seed, whose scores are exactly the given percents.

    Questions have a difficulty that all rows share; `noise` moves it in each row, so that differences vary from
    question to question. Without noise, whoever scores higher answers every question that the other answers.
    """
    rows = []
    for seed in seeds:
        hits = {}
        for task, percent in scores.items():
            difficulty = np.random.default_rng(zlib.crc32(task.encode())).permutation(questions) / questions
            own = np.random.default_rng([zlib.crc32(f"{label} {task}".encode()), seed]).normal(0, noise, questions)
            order = np.argsort(np.argsort(difficulty + own))
            hits[task] = "".join("1" if place < percent * questions / 100 else "0" for place in order)
        rows.append(
            {
                "name": f"{label.replace(' ', '-')}-seed{seed}", "label": label, "studies": list(studies),
                "settings": {**DEFAULTS, "held_out_questions": questions, **settings, "seed": seed},
                "seed": seed, "split": "test",
                "scores": {task: 100 * hits[task].count("1") / questions for task in hits}, "hits": hits, "floors": {},
                "trained": {"tower": 1000, "all": 5000},
                "losses": [2.0 - i / 64 - 0.01 * seed for i in range(64)],
                "seconds": {"prepare": 1.0, "train": 60.0, "score": 5.0},
                "device": "cpu", "versions": {"torch": "2.14.1"}, "date": "2026-11-26",
            }
        )  # fmt: skip
    return rows


def write(rows, folder):
    """Write each row to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / f"{row['name']}.json").write_text(json.dumps(row))
    return folder
