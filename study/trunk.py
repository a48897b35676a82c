"""The blocks that nothing trains, run once.

A tower whose first trained block is `first` gives the same activations before that block at every step. They
are computed once per picture; LLaVA then runs with `upper_blocks`, where the tower starts from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class _PassThrough(nn.Module):
    """Stands where the embeddings, the first norm and the trunk's blocks stood: what comes in is past them."""

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden


def _blocks(tower: nn.Module) -> nn.ModuleList:
    """The blocks of a Hugging Face CLIPVisionModel or Dinov2Model."""
    encoder = tower.get_submodule("encoder")
    blocks = encoder.get_submodule("layers" if hasattr(encoder, "layers") else "layer")
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def depth(tower: nn.Module) -> int:
    """How many blocks a tower has."""
    return len(_blocks(tower))


@torch.no_grad()
def run_trunk(tower: nn.Module, pictures: torch.Tensor, states: tuple[int, ...], batch: int = 256) -> dict:
    """Hidden states of every picture, from one pass.

    Args:
        tower: A Hugging Face vision model.
        pictures: Shape `(N, 3, H, W)`.
        states: Which hidden states to keep; `first` is what enters block `first`.
        batch: Pictures per forward.

    Returns:
        For each wanted state a tensor of shape `(N, tokens, D)`.
    """
    kept: dict[int, list[torch.Tensor]] = {state: [] for state in states}
    for chunk in pictures.split(batch):
        hidden = tower(chunk, output_hidden_states=True).hidden_states
        for state in states:
            kept[state].append(hidden[state])
    return {state: torch.cat(parts) for state, parts in kept.items()}


@contextmanager
def upper_blocks(tower: nn.Module, first: int) -> Iterator[None]:
    """While open, the tower starts at block `first` and takes that block's input for `pixel_values`.

    `hidden_states[-2]` stays what it was. The tower must have recorded hidden states once before, because
    transformers installs its recording hooks at the first such call, on the blocks that it then sees.
    """
    blocks, config = _blocks(tower), tower.config
    count = len(blocks)
    # the blocks keep their places, so that names found before still lead to them
    trunk = [blocks[i] for i in range(first)]
    swapped = {part: getattr(tower, part) for part in ("embeddings", "pre_layrnorm") if hasattr(tower, part)}
    for i in range(first):
        blocks[i] = _PassThrough()
    for part in swapped:
        setattr(tower, part, _PassThrough())
    config.num_hidden_layers = count - first  # as many as are recorded
    try:
        yield
    finally:
        config.num_hidden_layers = count
        for i, block in enumerate(trunk):
            blocks[i] = block
        for part, module in swapped.items():
            setattr(tower, part, module)
