"""Probe training: what a few steps on one kind of instruction do to the loss of the others.

The tower alone is trained, from the same start each time, by AdamW on float32 copies of its weights. Everything is put
back afterwards, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from covft.analysis.diagnosis.entries import endless, split
from covft.analysis.diagnosis.losses import Loss
from covft.analysis.stats.gradients import checked_loss, gradients_or_none, trainable
from covft.metrics import bootstrap
from covft.utils.modes import in_eval_mode

RATES = (1e-5, 1e-4, 1e-3)
RANK = 8  # of covft.tune(vit, "lora")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Change:
    """A mean over held-out samples, with a bootstrap interval over them.

    Attributes:
        mean: The mean.
        low: Lower end of the interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, changes: Mapping[str, np.ndarray], level: float) -> Change:
        """Estimate the mean over kinds of the mean over samples."""
        scores = {kind: values.tolist() for kind, values in changes.items()}
        found = bootstrap({0: scores}, resamples=_RESAMPLES, level=level)
        return cls(found.mean, found.low, found.high)


@dataclass(frozen=True)
class Probe:
    """Changes of held-out losses by a few steps of training; below zero is better.

    Attributes:
        before: Loss of each kind before any training.
        alone: Change of the loss of each kind, by the kind that was trained: `alone[trained][measured]`. The intervals
            of what training on one kind does to another hold all at once, by Bonferroni's method.
        joint: Change of the loss of each kind, by training on all.
        gain: Fall of the mean loss by training on all; above zero is better.
        kept: Share of this fall that remains with the `rank` largest directions of each weight's change alone.
        held_out: Samples of each kind that the changes are measured on.
        rate: Learning rate.
        steps: Steps of each training.
        batch: Samples per step.
        rank: Of the changes that `kept` is about.
    """

    before: dict[str, float]
    alone: dict[str, dict[str, Change]]
    joint: dict[str, Change]
    gain: Change
    kept: Change
    held_out: dict[str, int]
    rate: float
    steps: int
    batch: int
    rank: int = RANK


def probe(
    model: nn.Module,
    loss: Loss,
    samples: Sequence[Any],
    kinds: Sequence[str],
    weights: Mapping[int, Mapping[str, nn.Parameter]],
    *,
    steps: int = 10,
    batch: int = 8,
    rate: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Probe:
    """Train the weights of a tower on each kind of instruction alone, and on all, and measure held-out losses.

    Half of the samples are trained on, half are held out. It holds four copies of the weights, as training does.

    Args:
        model: What is run.
        loss: The mean loss of a list of samples.
        samples: The samples, at least two of each kind.
        kinds: Their kinds.
        weights: Of each block, as `block_weights` returns them.
        steps: Steps of each training.
        batch: Samples per step.
        rate: Learning rate; None takes the one of 1e-5, 1e-4 and 1e-3 with which training on all lowers the loss of
            the samples that it is trained on most.
        level: Confidence level of the intervals.
        seed: Of the halves, the order, and whatever the model draws.
    """
    run = _Run(model, loss, samples, [p for of_block in weights.values() for p in of_block.values()], steps, batch)
    train, held_out = split(kinds, seed)
    order = {kind: _cycle({kind: train[kind]}, seed) for kind in train}
    together = _cycle(train, seed)
    with undisturbed(model, seed), trainable(run.parameters, model), run.restored():
        before = run.losses(held_out)
        rate = run.best_rate(train, together) if rate is None else rate
        alone = {}
        for kind in train:
            run.train(order[kind], rate)
            alone[kind] = _less(run.losses(held_out), before)
            run.restore()
        run.train(together, rate)
        joint = _less(run.losses(held_out), before)
        run.reduce(RANK)
        reduced = _less(run.losses(held_out), before)
    others = max(len(train) * (len(train) - 1), 1)
    at_once = 1 - (1 - level) / others
    return Probe(
        before={kind: float(values.mean()) for kind, values in before.items()},
        alone={
            one: {
                other: Change.of({other: values}, level if one == other else at_once)
                for other, values in changes.items()
            }
            for one, changes in alone.items()
        },
        joint={kind: Change.of({kind: values}, level) for kind, values in joint.items()},
        gain=Change.of({kind: -values for kind, values in joint.items()}, level),
        kept=_share(reduced, joint, level, seed),
        held_out={kind: len(numbers) for kind, numbers in held_out.items()},
        rate=rate,
        steps=steps,
        batch=batch,
    )


class _Run:
    """Trains some weights, measures losses, and puts the weights back."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        samples: Sequence[Any],
        parameters: list[nn.Parameter],
        steps: int,
        batch: int,
    ) -> None:
        self.model, self.loss, self.samples, self.parameters = model, loss, samples, parameters
        self.steps, self.batch = steps, batch
        self.start = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def losses(self, numbers: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Return the loss of each sample."""
        return {
            kind: np.array([float(checked_loss(self.loss([self.samples[number]]))) for number in own])
            for kind, own in numbers.items()
        }

    def train(self, order: Sequence[int], rate: float) -> None:
        """Train on samples in some order; the weights have to be those of the start."""
        masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        optimizer = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
        for step in range(self.steps):
            chosen = [self.samples[order[(step * self.batch + i) % len(order)]] for i in range(self.batch)]
            with torch.enable_grad():
                found = gradients_or_none(self.loss(chosen), self.parameters)
            for master, gradient in zip(masters, found, strict=True):
                master.grad = None if gradient is None else gradient.float()
            optimizer.step()
            self._set(masters)

    def best_rate(self, train: Mapping[str, Sequence[int]], order: Sequence[int]) -> float:
        """Return the rate that lowers the mean loss of the trained samples most."""
        found: dict[float, float] = {}
        for rate in RATES:
            self.train(order, rate)
            means = [values.mean() for values in self.losses(train).values()]
            found[rate] = float(np.mean(means))
            self.restore()
        return min(found, key=lambda rate: found[rate])

    @torch.no_grad()
    def reduce(self, rank: int) -> None:
        """Keep the largest directions of the change of each matrix, and no change of vectors."""
        values = []
        for parameter, start in zip(self.parameters, self.start, strict=True):
            change = parameter.float() - start.float()
            values.append(start.float() + (_low_rank(change, rank) if change.dim() > 1 else 0))
        self._set(values)

    def restore(self) -> None:
        """Put the weights back."""
        self._set(self.start)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the weights back when it is left."""
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def _low_rank(change: Tensor, rank: int) -> Tensor:
    matrices = change if change.dim() == 3 else change.flatten(1)  # a stack of experts, or the kernel of a convolution
    most = min(matrices.shape[-2:])
    if most <= rank:
        return change
    u, s, v = torch.svd_lowrank(matrices, q=min(rank + 8, most), niter=4)
    kept = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank].mT
    return kept.reshape(change.shape)


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """While open, a model is in eval mode and draws from a seed; afterwards, mode and generators are as before.

    Args:
        model: The model.
        seed: Of what it draws.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with in_eval_mode(model), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def _cycle(numbers: Mapping[str, Sequence[int]], seed: int) -> list[int]:
    """Return an order with the kinds in turns, long enough that each sample comes at least once."""
    length = max(len(own) for own in numbers.values())
    each = [endless(own, seed) for own in numbers.values()]
    return [next(one) for _ in range(length) for one in each]


def _less(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {kind: values - before[kind] for kind, values in after.items()}


def _share(reduced: Mapping[str, np.ndarray], joint: Mapping[str, np.ndarray], level: float, seed: int) -> Change:
    """Return the ratio of two mean changes of the same samples; 0 where training lowers no loss."""
    draws = np.random.default_rng([3, seed])
    sums = np.zeros((2, _RESAMPLES))
    for kind, values in joint.items():
        drawn = draws.integers(len(values), size=(_RESAMPLES, len(values)))
        sums += np.stack([reduced[kind][drawn].mean(1), values[drawn].mean(1)])
    mean_reduced, mean_joint = (sum(one[kind].mean() for kind in joint) for one in (reduced, joint))
    if mean_joint >= 0:
        return Change(0.0, 0.0, 0.0)
    shares = np.where(sums[1] < 0, sums[0] / np.where(sums[1] < 0, sums[1], -1), 0.0)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return Change(float(mean_reduced / mean_joint), float(low), float(high))
