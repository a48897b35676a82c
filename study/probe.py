"""Scores of the two pretrained networks on validation scenes."""

from __future__ import annotations

import numpy as np
import torch

from covft.data import IGNORE_INDEX
from study.data.scenes import CELL, GRID, Scene, Thing, as_batch, make_scenes
from study.data.tasks import make_examples
from study.data.tiles import PHOTOS, SHAPES
from study.data.tokenizer import build_tokenizer
from study.data.word_pictures import WordPictures, make_word_pictures


def thing_features(tower: torch.nn.Module, scenes: list[Scene]) -> tuple[np.ndarray, list[Thing]]:
    """Return the penultimate features of each thing's patches, one row per thing, and the things."""
    rows, things = [], []
    for start in range(0, len(scenes), 256):
        chunk = scenes[start : start + 256]
        with torch.no_grad():
            hidden = tower(torch.from_numpy(as_batch(chunk)), output_hidden_states=True).hidden_states[-2]
        side = int((hidden.shape[1] - 1) ** 0.5)
        per_cell = side // GRID
        grid = hidden[:, 1:].reshape(len(chunk), GRID, per_cell, GRID, per_cell, -1)
        cells = grid.permute(0, 1, 3, 2, 4, 5).reshape(len(chunk), GRID * GRID, -1)
        for i, scene in enumerate(chunk):
            for thing in scene.things:
                rows.append(cells[i, thing.cell].numpy())
                things.append(thing)
    assert CELL % per_cell == 0
    return np.stack(rows), things


def probe_tower(tower: torch.nn.Module, train: int = 2000, validation: int = 600) -> dict[str, float]:
    """Return the accuracy of linear probes on things' own patches: what a frozen tower offers a projector."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = [thing_features(tower, make_scenes(s, n)) for s, n in (("train", train), ("validation", validation))]
    wanted = {
        "kind": (None, lambda thing: thing.kind),
        "colour": ("shape", lambda thing: thing.tile.colour),
        "shape": ("shape", lambda thing: thing.tile.name),
        "digit": ("digit", lambda thing: thing.tile.name),
        "word": ("word", lambda thing: thing.tile.name),
        "photo": ("photo", lambda thing: thing.tile.name),
    }
    scores = {}
    for name, (kind, label) in wanted.items():
        (x, y), (x_val, y_val) = (
            (
                features[[kind in (None, t.kind) for t in things]],
                [label(t) for t in things if kind in (None, t.kind)],
            )
            for features, things in parts
        )
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        scores[f"linear_probe_{name}"] = round(float(probe.fit(x, y).score(x_val, y_val)), 4)
    return scores


def presence_auc(tower: torch.nn.Module, train: int = 1500, validation: int = 400) -> float:
    """Return the mean area under the ROC curve of linear probes on the pooled output for the presence of things.

    CLIP-style pretraining teaches this directly; a random tower scores lower.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = [make_scenes("train", train), make_scenes("validation", validation)]
    with torch.no_grad():
        x, x_val = (tower(torch.from_numpy(as_batch(part))).pooler_output.numpy() for part in parts)
    areas = []
    for name in ("digit", "word", *SHAPES, *PHOTOS):
        y, y_val = ([any(name == t.reference for t in scene.things) for scene in part] for part in parts)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(x, y)
        areas.append(roc_auc_score(y_val, probe.predict_proba(x_val)[:, 1]))
    return round(float(np.mean(areas)), 4)


def measure_language_model(model: torch.nn.Module, scenes: int = 600, per_task: int = 300) -> dict[str, float]:
    """Return exact-match accuracies on word pictures of validation scenes, question by question.

    Those of each task are with 36 image tokens, the means over tasks also with 9 and 4.
    """
    drawn = make_scenes("validation", scenes)
    examples = make_examples(drawn, per_task=per_task)
    data = make_word_pictures(build_tokenizer(), [(drawn[e.scene], [(e.question, e.answer)]) for e in examples])
    data = data.to(next(model.parameters()).device)
    scores: dict[str, float] = {}
    means: dict[str, float] = {}
    for side in (6, 3, 2):
        hits = _answered(model, data, side)
        of_task = {
            task: float(np.mean([hit for example, hit in zip(examples, hits, strict=True) if example.task == task]))
            for task in dict.fromkeys(example.task for example in examples)
        }
        scores = scores or {f"word_pictures_{task}": round(share, 4) for task, share in of_task.items()}
        means[f"word_pictures_mean_{side * side}_tokens"] = round(float(np.mean(list(of_task.values()))), 4)
    return scores | means


@torch.no_grad()
def _answered(model: torch.nn.Module, data: WordPictures, side: int) -> list[bool]:
    """Return whether each row's answer is right."""
    found: list[bool] = []
    for start in range(0, len(data), 256):
        batch = data.batch(model, torch.arange(start, min(start + 256, len(data))), side=side)
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch).logits[:, :-1].argmax(-1)
        # greedy decoding gives the answer exactly if every next word is right after the right ones
        found += ((predicted == labels) | (labels == IGNORE_INDEX)).all(1).tolist()
    return found
