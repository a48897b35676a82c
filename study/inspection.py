"""Expert weights and context vectors of held-out questions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from study.comparison import Comparison, TrainedModel
from study.trunk import upper_blocks


@dataclass
class Inspection:
    """Expert weights and context vectors of held-out questions.

    Attributes:
        tasks: Task of each question.
        weights: Expert weights by layer, shape `(questions, E)`.
        contexts: Context vectors by layer, shape `(questions, W)`.
    """

    tasks: list[str]
    weights: dict[int, torch.Tensor]
    contexts: dict[int, torch.Tensor]


@torch.no_grad()
def inspect_routing(comparison: Comparison, trained: TrainedModel, per_task: int = 60, batch: int = 120) -> Inspection:
    """Run held-out questions through the wrapped tower and record their routing."""
    encoder = trained.encoder
    assert encoder is not None
    left = dict.fromkeys(comparison.settings.tasks, per_task)
    examples = []
    for example in comparison.held_out.examples:
        if left[example.task] > 0:
            left[example.task] -= 1
            examples.append(example)
    states = comparison.held_out.states[trained.start]
    weights: dict[int, list[torch.Tensor]] = {}
    contexts: dict[int, list[torch.Tensor]] = {}
    encoder.eval()
    with upper_blocks(encoder.vit, trained.start):
        for start in range(0, len(examples), batch):
            chunk = examples[start : start + batch]
            with encoder.condition([example.question for example in chunk]):
                encoder.vit(states[[example.scene for example in chunk]])
            for layer, found in encoder.routing_weights().items():
                weights.setdefault(layer, []).append(found.detach())
            for layer, found in encoder.context_vectors().items():
                contexts.setdefault(layer, []).append(found.detach())
    return Inspection(
        [example.task for example in examples],
        {layer: torch.cat(parts) for layer, parts in weights.items()},
        {layer: torch.cat(parts) for layer, parts in contexts.items()},
    )
