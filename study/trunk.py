"""The trunk: frozen blocks before the first trained one, run once per image.

Their output for an image is the same at every step, so it is cached. LLaVA then runs inside `upper_blocks`, where
the tower starts from the cached states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class PassThrough(nn.Module):
    """Stands in for the embeddings, the first norm and the trunk's blocks, and returns its input."""

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Return the first argument."""
        return hidden


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """Return the blocks of a CLIPVisionModel or Dinov2Model."""
    encoder = tower.get_submodule("encoder")
    blocks = encoder.get_submodule("layers" if hasattr(encoder, "layers") else "layer")
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def depth(tower: nn.Module) -> int:
    """Count the tower's blocks."""
    return len(blocks_of(tower))


@torch.no_grad()
def run_trunk(
    tower: nn.Module, images: torch.Tensor, states: tuple[int, ...], batch: int = 256
) -> dict[int, torch.Tensor]:
    """Return hidden states of every image, from one pass.

    Args:
        tower: A vision model of transformers.
        images: Shape `(N, 3, H, W)`.
        states: Indices of the hidden states to keep; state `i` is the input of block `i`.
        batch: Images per forward.

    Returns:
        Tensors of shape `(N, tokens, D)` by index.
    """
    kept: dict[int, list[torch.Tensor]] = {state: [] for state in states}
    for chunk in images.split(batch):
        hidden = tower(chunk, output_hidden_states=True).hidden_states
        for state in states:
            kept[state].append(hidden[state])
    return {state: torch.cat(parts) for state, parts in kept.items()}


@contextmanager
def upper_blocks(tower: nn.Module, first: int) -> Iterator[None]:
    """While open, start the tower at block `first`, with that block's input as `pixel_values`.

    `hidden_states[-2]` stays the same. Whoever wants hidden states calls the complete tower with them once before,
    because transformers puts its recording hooks on the blocks that it finds at that time.
    """
    blocks, config = blocks_of(tower), tower.config
    count = len(blocks)
    # indices of the upper blocks stay, so that names of modules stay valid
    trunk = [blocks[i] for i in range(first)]
    replaced = {name: getattr(tower, name) for name in ("embeddings", "pre_layrnorm") if hasattr(tower, name)}
    for i in range(first):
        blocks[i] = PassThrough()
    for name in replaced:
        setattr(tower, name, PassThrough())
    config.num_hidden_layers = count - first  # the number of recorded blocks
    try:
        yield
    finally:
        config.num_hidden_layers = count
        for i, block in enumerate(trunk):
            blocks[i] = block
        for name, module in replaced.items():
            setattr(tower, name, module)
