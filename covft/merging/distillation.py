"""Distils the features of the mixture into the merged FFNs, without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from tqdm.auto import tqdm  # comes with huggingface_hub

from covft.analysis.running import Subject
from covft.analysis.samples import Batch
from covft.merging.average import Merged, in_place
from covft.merging.measuring import features_of
from covft.nn.functional import HALF


def distil(
    subject: Subject, merged: Merged, data: Sequence[Batch], *, steps: int, lr: float, seed: int, show: bool
) -> list[float]:
    """Train the merged FFNs, in place, until the ViT's features are close to the mixture's.

    AdamW without weight decay, cosine decay to zero; the loss is the squared error of the last read block's output,
    relative to its square.

    Args:
        subject: The model, at rest.
        merged: The FFNs, in float32 or wider.
        data: Batches.
        steps: Number of steps, one batch each.
        lr: Peak learning rate.
        seed: Seed of the order of batches.
        show: Whether to show a progress bar.

    Returns:
        The loss of each step.
    """
    encoder = subject.encoder
    parameters = [p for ffn in merged.values() for p in ffn.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    bar = tqdm(total=steps, desc="distilling", unit="step", disable=not show)
    for number in _order(len(data), seed):
        if len(losses) == steps:
            break
        wanted = features_of(subject, data[number])
        if wanted is None:
            continue
        kind, dtype = wanted.tokens.device.type, wanted.tokens.dtype
        precision = torch.autocast(kind, dtype) if dtype in HALF else contextlib.nullcontext()
        with in_place(encoder, merged), torch.enable_grad(), precision:
            found = features_of(subject, data[number])
        assert found is not None
        with torch.enable_grad():
            loss = (found - wanted).tokens.square().sum() / wanted.tokens.float().square().sum()
            # Not backward(): trained norms of the ViT must not get gradients of this.
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2e}")
        bar.update()
    bar.close()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return losses


def _order(batches: int, seed: int) -> Iterator[int]:
    """Yield numbers of batches without end; each once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()
