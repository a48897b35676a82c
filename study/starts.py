"""`python -m study.starts`: what each start of the experts does to the packaged backbone before any training.

For every start it prints, as a table in Markdown, the relative change of the features of 32 scenes, and the norm of
the routers' gradient relative to that of the experts, for a loss that is a fixed random projection of the features.
Both are averaged over three seeds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

import covft
from study.data.packages import minilm_folder
from study.data.scenes import as_batch, make_scenes
from study.data.tasks import make_examples
from study.runs.build import plain_tower

STARTS = [
    ("upcycled", 0.0),
    *(("noise", scale) for scale in (0.01, 0.03, 0.1, 0.3)),
    *(("drop", share) for share in (0.1, 0.25, 0.5)),
]
LAYERS = tuple(range(5, 11))  # of twelve, as wrap() chooses
SEEDS = (0, 1, 2)
SCENES, SIDE = 32, 84  # pixels


def measure(kind: str, scale: float, seed: int) -> tuple[float, float]:
    """Return the relative change of the features, and the routers' share of the gradient.

    Args:
        kind: `expert_init`.
        scale: `expert_init_scale`.
        seed: Seed of the start and of the routers.
    """
    scenes = make_scenes("train", SCENES, 0)
    questions = [example.question for example in make_examples(scenes, seed=0)[:SCENES]]
    vit = plain_tower("backbone")
    images = torch.nn.functional.interpolate(torch.from_numpy(as_batch(scenes)), SIDE, mode="bilinear")
    with torch.no_grad():
        before = vit(images).last_hidden_state
    torch.manual_seed(seed)
    encoder = covft.wrap(
        vit,
        str(minilm_folder()),
        layers=LAYERS,
        expert_init=kind,
        expert_init_scale=scale,
        expert_init_seed=seed,
    )
    after = encoder(images, questions).last_hidden_state
    change = torch.linalg.vector_norm(after.detach() - before) / torch.linalg.vector_norm(before)
    direction = torch.randn(after.shape, generator=torch.Generator().manual_seed(seed))
    (after * direction).mean().backward()
    slots = encoder.slots().values()
    routers, experts = (_gradient(part(slot) for slot in slots) for part in (_router, _experts))
    return float(change), routers / experts


def _router(slot: nn.Module) -> nn.Module:
    return slot.get_submodule("router")


def _experts(slot: nn.Module) -> nn.Module:
    return slot.get_submodule("experts")


def _gradient(parts: Iterable[nn.Module]) -> float:
    gradients = [p.grad.flatten() for part in parts for p in part.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.cat(gradients)))


def main() -> None:
    """Print the table."""
    print("| start | scale | change of the features | routers' gradient |\n|---|---|---|---|")
    for kind, scale in STARTS:
        found = [measure(kind, scale, seed) for seed in SEEDS]
        change, gradient = (sum(values) / len(values) for values in zip(*found, strict=True))
        print(f"| `{kind}` | {scale:g} | {100 * change:.2g} % | {gradient:.1e} |", flush=True)


if __name__ == "__main__":
    main()
