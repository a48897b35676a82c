"""Audits the conditioning of a trained covft: is the tower's text used? By `covft.analysis.audit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covft.analysis.audit import Audit, audit, compare
from study.data.tasks import TASKS
from study.runs.model import started_at
from study.runs.run import Trained
from study.runs.score import right_answers
from study.runs.texts import encode

GENERIC = TASKS["caption"].phrasings[0].format("the picture")
PER_PICTURE = 2  # questions, of different tasks


def audited(trained: Trained) -> dict[str, Any]:
    """Score a trained covft with the right and with wrong texts for its tower; the prompts stay.

    Args:
        trained: The model, and the held-out questions.

    Returns:
        The task and the picture of each question, and its scores by text, a string of 0 and 1 each.
    """
    asked = trained.questions
    examples = asked.table.examples
    rows = questions_of([(example.task, example.scene) for example in examples], trained.settings.seed)
    entries = [
        {
            "pixel_values": torch.zeros(1, 3, 1, 1),  # the score has the picture, by its row
            "context_text": examples[row].question,
            "kind": examples[row].task,
            "row": row,
        }
        for row in rows
    ]
    first_text = torch.zeros_like(asked.told)

    def score(model: Any, entry: Mapping[str, Any], text: str | Tensor) -> float:
        features = encode(trained.settings.text_encoder, (text,)) if isinstance(text, str) else text
        told = replace(asked, texts=features.to(asked.ids.device), told=first_text)
        return float(right_answers(trained.model, told, np.array([entry["row"]]))[0])

    with started_at(trained.model.encoder.vit, trained.first):
        found = audit(
            trained.model.llava,
            iter(entries),  # in their order
            score=score,
            images=lambda entry: examples[entry["row"]].scene,
            generic=GENERIC,
            samples=len(entries),
            seed=trained.settings.seed,
        )
    return {
        "generic": GENERIC,
        "tasks": [examples[row].task for row in rows],
        "pictures": [examples[row].scene for row in rows],
        "scores": {name: "".join(str(int(hit)) for hit in hits) for name, hits in found.scores.items()},
    }


def questions_of(asked: list[tuple[str, int]], seed: int) -> list[int]:
    """Choose two questions about each picture at random, captions apart; pictures with fewer are left out.

    Args:
        asked: Task and picture of each question.
        seed: Of the choice.

    Returns:
        Rows of the questions, by picture.
    """
    by_picture: dict[int, list[int]] = {}
    for row, (task, picture) in enumerate(asked):
        if TASKS[task].metric != "cider":  # a caption is not right or wrong
            by_picture.setdefault(picture, []).append(row)
    draws = np.random.default_rng([13, seed])
    return [
        row
        for _, rows in sorted(by_picture.items())
        if len(rows) >= PER_PICTURE
        for row in sorted(draws.choice(rows, PER_PICTURE, replace=False).tolist())
    ]


def read(found: Mapping[str, Any]) -> Audit:
    """Return the audit whose scores were written.

    Args:
        found: What `audited` returned.
    """
    scores = {name: np.array([float(hit) for hit in hits]) for name, hits in found["scores"].items()}
    return compare(scores, found["pictures"])


def both_right(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return for each picture whether all of its questions are right, 1 or 0, by text.

    Args:
        found: What `audited` returned.
    """
    pictures = np.array(found["pictures"])
    each = [pictures == picture for picture in dict.fromkeys(found["pictures"])]
    hits = {name: np.array([float(hit) for hit in values]) for name, values in found["scores"].items()}
    return {name: [float(values[own].min()) for own in each] for name, values in hits.items()}
