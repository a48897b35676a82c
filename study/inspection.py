"""What the wrapped tower did with the questions: expert weights and context vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from study.study import Study, Trained
from study.trunk import upper_blocks


@dataclass
class Inspection:
    """Routing and context of held-out questions.

    Attributes:
        tasks: Task of each row.
        weights: Expert weights by layer, shape `(questions, E)`.
        contexts: Context vectors by layer, shape `(questions, C)`.
    """

    tasks: list[str]
    weights: dict[int, torch.Tensor]
    contexts: dict[int, torch.Tensor]


@torch.no_grad()
def inspect(study: Study, trained: Trained, per_task: int = 60, batch: int = 120) -> Inspection:
    """Run held-out questions through the wrapped tower and keep what routed them."""
    encoder = trained.encoder
    assert encoder is not None
    left = dict.fromkeys(study.settings.tasks, per_task)
    chosen = []
    for example in study.held_out.examples:
        if left[example.task] > 0:
            left[example.task] -= 1
            chosen.append(example)
    pictures = study.held_out.states[trained.start]
    weights: dict[int, list[torch.Tensor]] = {}
    contexts: dict[int, list[torch.Tensor]] = {}
    encoder.eval()
    with upper_blocks(encoder.vit, trained.start):
        for start in range(0, len(chosen), batch):
            rows = chosen[start : start + batch]
            with encoder.condition([e.question for e in rows]):
                encoder.vit(pictures[[e.scene for e in rows]])
            for layer, found in encoder.routing_weights().items():
                weights.setdefault(layer, []).append(found.detach())
            for layer, found in encoder.context_vectors().items():
                contexts.setdefault(layer, []).append(found.detach())
    return Inspection(
        [e.task for e in chosen],
        {layer: torch.cat(parts) for layer, parts in weights.items()},
        {layer: torch.cat(parts) for layer, parts in contexts.items()},
    )
