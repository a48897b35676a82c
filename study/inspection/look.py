"""Looks at a trained covft: contexts, routing, experts, and where the context looks.

Shapes: N questions, W width of a context vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import covft
from covft.analysis import Recording, record, stats
from covft.analysis.stats.routing import pair_similarities
from study.data.tasks import Example
from study.inspection.conditioning import audited
from study.runs.build import pictures_of
from study.runs.run import Trained
from study.runs.settings import RunSettings
from study.runs.tables import chosen, held_out_part
from study.runs.texts import WIDTH, encode
from study.runs.train import as_tower_takes
from study.towers import small_vit

PER_TASK = 60  # questions
SHOWN_PAIRS = 1500  # of the scatter
PICTURES = 4  # whose attention is drawn
_AT_ONCE = 120


class Texts:
    """A text encoder of the study, from its prepared features.

    Args:
        name: Its name in the study.
    """

    def __init__(self, name: str) -> None:
        self.name, self.text_dim = name, WIDTH

    def encode(self, texts: list[str]) -> Tensor:
        """Encode questions of the study."""
        return encode(self.name, tuple(texts))


@dataclass(frozen=True)
class Looked:
    """Looks at a trained covft, and saves it with its recordings, for `covft report`.

    Attributes:
        folder: Where to.
    """

    folder: Path

    def __call__(self, trained: Trained) -> dict[str, Any]:
        """Return what joins the run's row."""
        trained.model.encoder.save_pretrained(self.folder)
        encoder = covft.load(self.folder, vit=small_vit(), text_encoder=Texts(trained.settings.text_encoder)).eval()
        return {**look(encoder, trained.settings, self.folder), "audit": audited(trained)}


def look(encoder: covft.ContextEncoder, settings: RunSettings, folder: Path | None = None) -> dict[str, Any]:
    """Return what there is to see of an encoder on held-out questions, as JSON values.

    Args:
        encoder: An encoder that reads questions of the study.
        settings: The run.
        folder: Where to save recordings; None saves none.
    """
    pictures, examples = questions_of(settings)
    data = [(pictures[example.scene], example.question, example.task) for example in examples]
    recording = record(encoder, data, batch_size=_AT_ONCE)
    found = {"samples": len(recording), "contexts": _contexts(recording), "routing": _routing(recording)}
    asked = encode(settings.text_encoder, tuple(example.question for example in examples))
    shown = pictures[[example.scene for example in examples]]
    found["similarity"] = _similarity(asked, shown, found["contexts"]["labels"])
    apart = stats.divergence(encoder, data[:: max(1, len(data) // 64)], samples=64)
    found["experts"] = {str(layer): _rounded([one.weights, one.outputs]) for layer, one in apart.items()}
    if folder is not None:
        recording.save(folder)
        _save_maps(encoder, pictures, examples, folder)
    return found


def questions_of(settings: RunSettings) -> tuple[Tensor, list[Example]]:
    """Return held-out pictures as the tower takes them, and some questions of each task about them."""
    part = held_out_part(settings)
    left: Counter[str] = Counter()
    kept = []
    for example in chosen(part, settings.scored):
        left[example.task] += 1
        if left[example.task] <= PER_TASK:
            kept.append(example)
    return as_tower_takes(pictures_of(settings, part)), kept


def _contexts(recording: Recording) -> dict[str, Any]:
    """Return principal components and clusters of the last adapted block's contexts."""
    last = recording.layers[-1]
    vectors = recording.contexts[last]
    projection, clusters = stats.project(vectors), stats.cluster(vectors)
    return {
        "layer": last,
        "points": _rounded(projection.points),
        "explained": _rounded(projection.explained),
        "labels": clusters.labels.tolist(),
        "silhouette": round(clusters.silhouette, 4),
        "nearest": [[recording.texts[row] for row in rows] for rows in clusters.nearest],
        "tasks": list(recording.kinds),
    }


def _routing(recording: Recording) -> dict[str, Any]:
    """Return mean weights, specialisation, and the correlation of contexts and routing."""
    last = recording.layers[-1]
    layers = {}
    for layer, summary in stats.summarise(recording.weights, recording.kinds).items():
        special = stats.specialisation(recording.weights[layer], recording.kinds)
        layers[str(layer)] = {
            "load": _rounded(summary.load),
            "by_task": dict(zip(summary.kinds, _rounded(summary.by_kind), strict=True)),
            "entropy": round(summary.entropy, 4),
            "information": _rounded([special.information, special.by_chance, special.most, special.p_value]),
        }
    try:
        correlation = stats.correlate(recording.contexts[last], recording.weights)
    except covft.errors.ConfigError:  # all samples are routed alike
        return {"layers": layers, "r": None}
    x, y = pair_similarities(recording.contexts[last], recording.weights)
    drawn = np.random.default_rng(0).choice(len(x), min(SHOWN_PAIRS, len(x)), replace=False)
    r = {"r": correlation.r, "low": correlation.low, "high": correlation.high, "samples": correlation.samples}
    return {"layers": layers, "r": r, "pairs": _rounded(np.stack([x[drawn], y[drawn]]))}


def _similarity(asked: Tensor, shown: Tensor, labels: Sequence[int]) -> dict[str, Any]:
    """Return how alike texts, and pictures, are within and between clusters of contexts: mean cosines."""
    with torch.no_grad():
        tower = small_vit()
        seen = torch.cat([tower(part).last_hidden_state[:, 1:].mean(1) for part in shown.split(_AT_ONCE)])
    found = {}
    for name, vectors in (("texts", asked), ("pictures", seen)):
        alike = stats.similarity(vectors.numpy(), labels)
        found[name] = _rounded([alike.within, alike.between])
    return found


def _save_maps(encoder: Any, pictures: Tensor, examples: Sequence[Example], folder: Path) -> None:
    """Save where the context looks in some pictures, and what moves between the two questions of the conflict."""
    by_scene: dict[int, dict[str, str]] = {}
    for example in examples:
        by_scene.setdefault(example.scene, {})[example.task] = example.question
    both = [scene for scene, asked in by_scene.items() if {"grounding", "caption"} <= set(asked)][:PICTURES]
    images = pictures[[scene for scene in both for _ in range(2)]]
    texts = [by_scene[scene][task] for scene in both for task in ("grounding", "caption")]
    stats.attention_maps(encoder, images, texts).save(folder)
    stats.compare_questions(encoder, images[0], texts[:2]).save(folder)


def _rounded(values: Any) -> Any:
    return np.round(np.asarray(values, dtype=np.float64), 4).tolist()
