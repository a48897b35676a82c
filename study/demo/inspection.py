"""What is kept of each trained model: answers about the first scenes, and of CoVFT its routing, encoder and model.

Shapes: N questions, W width of a context vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study.data.tasks import TASKS, Example
from study.data.tokenizer import build_tokenizer
from study.demo.saving import save_model
from study.runs.build import pictures_of
from study.runs.model import started_at
from study.runs.run import Trained
from study.runs.score import greedy_answers
from study.runs.tables import held_out_part
from study.runs.train import as_tower_takes
from study.towers import small_vit

ENCODER, MODEL = "encoder", "model"  # folders
SCENES, QUESTIONS = 8, 4  # on the page
PER_TASK = 60  # questions whose routing is kept
COMPARED = 64  # questions whose outputs are compared after loading
_FIRST = ("grounding", "caption")  # the conflict, about the same picture


@dataclass(frozen=True)
class Inspector:
    """Looks at each trained model, in the process that trained it; saves the encoder of covft, and the model around it.

    Attributes:
        folder: Folder for both, `encoder` and `model`.
    """

    folder: Path

    def __call__(self, trained: Trained) -> dict[str, Any]:
        """Return what joins the run's row."""
        rows = examples_shown(trained.questions.table.examples)
        with started_at(trained.model.encoder.vit, trained.first), torch.no_grad():
            found: dict[str, Any] = {"answers": _answers(trained, rows)}
            if is_covft(trained):
                found |= _routing(trained)
        if is_covft(trained):
            found["saved"] = _save_and_load(trained, self.folder / ENCODER)
            save_model(trained, self.folder / MODEL)
        return found


def is_covft(trained: Trained) -> bool:
    """Return whether the model is covft without a control."""
    return trained.settings.method == "covft" and trained.settings.control == "none"


def examples_shown(examples: list[Example]) -> list[int]:
    """Return the questions of the page: a few about each of the first scenes, whether or not the answers are right."""
    by_scene: dict[int, list[int]] = {}
    for row, example in enumerate(examples):
        by_scene.setdefault(example.scene, []).append(row)
    found = []
    for scene in sorted(by_scene)[:SCENES]:
        found += sorted(by_scene[scene], key=lambda row: examples[row].task not in _FIRST)[:QUESTIONS]
    return found


def _answers(trained: Trained, rows: list[int]) -> list[str]:
    tokenizer = build_tokenizer()
    answers = greedy_answers(trained.model, trained.questions, np.array(rows), int(tokenizer.eos_token_id))
    return [" ".join(tokenizer.convert_ids_to_tokens(answer)) for answer in answers]


def _routing(trained: Trained) -> dict[str, Any]:
    """Return mean expert weights by block and task, and context vectors in two dimensions."""
    encoder, questions = trained.model.encoder, trained.questions
    assert questions.texts is not None
    examples = questions.table.examples
    left: dict[str, int] = {}
    rows = []
    for row, example in enumerate(examples):
        left[example.task] = left.get(example.task, PER_TASK) - 1
        if left[example.task] >= 0:
            rows.append(row)
    encoder.eval()
    on = torch.tensor(rows, device=questions.ids.device)
    encoder(questions.tower_inputs(questions.scene[on]), questions.texts[questions.told[on]])
    tasks = np.array([examples[row].task for row in rows])
    names = [task for task in TASKS if task in tasks]
    weights = {
        str(layer): {task: np.round(found.cpu().numpy()[tasks == task].mean(0), 4).tolist() for task in names}
        for layer, found in encoder.routing_weights().items()
    }
    contexts = {}
    for layer, found in encoder.context_vectors().items():
        points, share = flattened(found.float().cpu().numpy())
        by_task = {task: np.round(points[tasks == task], 3).tolist() for task in names}
        contexts[str(layer)] = {"share": round(share, 4), "points": by_task}
    return {"weights": weights, "contexts": contexts}


def flattened(vectors_NW: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the first two principal components of vectors, `(N, 2)`, and their share of the variance."""
    centred = vectors_NW - vectors_NW.mean(0)
    left, scales, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * scales[:2], float((scales[:2] ** 2).sum() / max((scales**2).sum(), 1e-12))


@torch.no_grad()
def _save_and_load(trained: Trained, folder: Path) -> dict[str, float]:
    """Save the encoder, load it into a fresh ViT, and compare the outputs on scored scenes."""
    import covft

    encoder, questions = trained.model.encoder, trained.questions
    assert questions.texts is not None
    on = torch.arange(min(COMPARED, len(questions.scene)), device=questions.ids.device)
    told = questions.texts[questions.told[on]].cpu()
    part = held_out_part(trained.settings)
    pictures = as_tower_takes(pictures_of(trained.settings, part)[questions.scene[on].cpu()])
    encoder.save_pretrained(folder)
    loaded = covft.load(folder, vit=small_vit(), text_encoder=told.shape[-1]).eval()
    device = questions.ids.device
    ours = encoder.eval()(pictures.to(device), told.to(device)).last_hidden_state.cpu()
    theirs = loaded(pictures, told).last_hidden_state
    plain = small_vit()(pictures).last_hidden_state
    return {"loaded": float((ours - theirs).abs().max()), "pretrained": float((ours - plain).abs().max())}
