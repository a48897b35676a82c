"""Ten questions about one picture: ten calls of the tower, and one trunk with ten upper halves."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.speed.measure import flops
from benchmarks.speed.sizes import Record, Size
from benchmarks.speed.tower import Tower


class _Mark:
    """Notes the time when a block begins; a forward pre-hook."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, *_: Any) -> None:
        self.at = time.process_time()


@torch.no_grad()
def questions(size: Size, count: int = 10) -> Record:
    """Measure in turns, so that other load of the machine affects both sides alike.

    The floor is what the ten calls took, with what they took before the first adapted block counted once.

    Args:
        size: Sizes of the tower.
        count: Number of questions.

    Returns:
        CPU seconds and floating-point operations.
    """
    tower = Tower(size, batch=1)
    encoder = tower.wrapped(feature_layer=-2).eval()  # LLaVA's: the last block is skipped
    texts = torch.randn(count, 1, size.text_dim)
    read = {"output_hidden_states": True}
    mark = _Mark()
    encoder.vit.get_submodule(encoder.spec.blocks[size.layers[0]].path).register_forward_pre_hook(mark)
    trunk = encoder.trunk(tower.images, **read)
    encoder(trunk=trunk, text=texts[0])  # warms up
    full, before, upper, once = [], [], [], 0.0
    for number, text in enumerate(texts):
        start = time.process_time()
        expected = encoder(tower.images, text, **read).hidden_states[-2]
        full.append(time.process_time() - start)
        before.append(mark.at - start)
        if number == 0:
            start = time.process_time()
            trunk = encoder.trunk(tower.images, **read)
            once = time.process_time() - start
        start = time.process_time()
        found = encoder(trunk=trunk, text=text).hidden_states[-2]
        upper.append(time.process_time() - start)
        assert torch.equal(found, expected)
    floor = sum(full) - sum(before) * (count - 1) / count
    measured = once + sum(upper)
    return {
        "count": count, "layers": list(size.layers), "full": sum(full), "trunk": once, "upper": sum(upper),
        "floor": floor, "of_floor": measured / floor, "of_full": measured / sum(full), "bytes": trunk.states.nbytes,
        "flops": operations(size),
    }  # fmt: skip


@torch.no_grad()
def operations(size: Size) -> dict[str, int]:
    """Count the floating-point operations of a call, of its trunk and of what follows the trunk, on no device."""
    with torch.device("meta"):
        tower = Tower(size, batch=1, device="meta")
        encoder = tower.wrapped(feature_layer=-2).eval()
        trunk = encoder.trunk(tower.images)
        return {
            "full": flops(lambda: encoder(tower.images, tower.text)),
            "trunk": flops(lambda: encoder.trunk(tower.images)),
            "upper": flops(lambda: encoder(trunk=trunk, text=tower.text)),
        }
