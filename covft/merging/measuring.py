"""How far features and answers move when mixtures are merged, and what is lost in which block.

Shapes: B images or tiles, E experts, R rows of `input_ids`, L their length.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from covft.analysis.running import Subject
from covft.analysis.samples import Batch, Data, arguments, batches
from covft.data import Collator, ConversationDataset
from covft.errors import ConfigError
from covft.integrations.mllm.attachment import read_layers
from covft.merging.average import Merged, in_place
from covft.merging.report import BlockLoss, Shift
from covft.nn.router import Routing
from covft.nn.segments import Segments
from covft.surgery.skipping import last_of, last_read
from covft.surgery.wrapped import module_at


def prepared(subject: Subject, data: Data, size: int) -> list[Batch]:
    """Read data into batches; those of a multimodal LLM that have prompts stay complete, so that it can answer.

    Args:
        subject: The model.
        data: As for `merge`.
        size: Samples per batch.
    """
    if subject.attachment is None:
        return list(batches(data, size))
    if isinstance(data, ConversationDataset):
        data = _collated(data, size)
    found: list[Batch] = []
    for entry in data:  # type: ignore[union-attr]
        complete = isinstance(entry, Mapping) and getattr(entry.get("input_ids"), "ndim", 0) == 2
        found += [arguments(entry)] if complete else batches([entry], size)
    return found


def _collated(data: ConversationDataset, size: int) -> Iterator[dict[str, Any]]:
    pad = data.tokenizer.pad_token_id
    collate = Collator(data.tokenizer.eos_token_id if pad is None else pad, data.image_shape)
    for start in range(0, len(data), size):
        samples = [data[number] for number in range(start, min(start + size, len(data)))]
        kinds = [data.source[sample["row"]].dataset or None for sample in samples]
        yield {**collate(samples), "kind": kinds}


@dataclass(frozen=True)
class Features:
    """Output of the last block that is read.

    Attributes:
        tokens: Tokens of all images, in the block's layout.
        segments: Which tokens belong to which image, where they are packed.
    """

    tokens: Tensor
    segments: Segments | None

    def squares(self, images: int) -> Tensor:
        """Return the sum of squares of each image, shape `(B,)`."""
        wide = self.tokens.to(torch.promote_types(self.tokens.dtype, torch.float32)).square()
        if self.segments is None:
            return wide.reshape(images, -1).sum(1)
        of_tokens = wide.flatten(0, -2).sum(1)
        return of_tokens.new_zeros(images).index_add(0, self.segments.ids_T, of_tokens)

    def __sub__(self, other: Features) -> Features:
        """Return the difference, in float32 or wider."""
        wide = torch.promote_types(self.tokens.dtype, torch.float32)
        return Features(self.tokens.to(wide) - other.tokens.to(wide), self.segments)


class Reached(Exception):
    """The last block that is read has run, and no more was asked for."""


@contextlib.contextmanager
def watched(subject: Subject, *, stop: bool = False) -> Iterator[list[Features]]:
    """While open, keep what the last block that is read returns.

    Args:
        subject: The model.
        stop: Whether to raise `Reached` then.
    """
    encoder, seen = subject.encoder, []
    if subject.attachment is None:
        last = last_read(encoder.spec, encoder.feature_layer)
    else:
        last = last_of(encoder.spec, read_layers(subject.attachment.model))
    block = encoder.spec.blocks[last]

    def keep(_: Any, args: Any, output: Any) -> None:
        parts = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
        tokens = next((part for part in reversed(parts) if block.embed_dim in part.shape[1:]), parts[0])
        scope = encoder.conditioning.scope()
        seen.append(Features(tokens, encoder.conditioning.segments_of(scope, tokens)))
        if stop:
            raise Reached

    handle = module_at(encoder.vit, block.path).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def features_of(subject: Subject, batch: Batch) -> Features | None:
    """Run the tower on a batch as far as it is read; None if the batch has no image."""
    with watched(subject, stop=True) as seen, contextlib.suppress(Reached):
        subject.run(batch)
    return seen[-1] if seen else None


@dataclass
class Kind:
    """Sums over the samples of a kind."""

    samples: int = 0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # mixture, merged - it, untuned - it
    answered: int = 0
    same: int = 0
    words: int = 0
    divergence: float = 0.0

    def shift(self) -> Shift:
        """Return the shift."""
        mixture, merged, untuned = self.squares
        answers = (self.same / self.answered, self.divergence / self.words) if self.answered else (None, None)
        return Shift(self.samples, math.sqrt(merged / mixture), math.sqrt(untuned / mixture), *answers)


def shifts(subject: Subject, merged: Merged, data: Iterable[Batch]) -> tuple[Shift, dict[str, Shift]]:
    """Compare the mixture with the merged ViT and with the ViT before tuning.

    Args:
        subject: The model, at rest.
        merged: The merged FFNs, as they would run.
        data: Batches.

    Returns:
        The shift over all samples, and by kind of instruction.
    """
    kinds: dict[str | None, Kind] = {}
    total, encoder = Kind(), subject.encoder
    for batch in data:
        with watched(subject) as seen:
            before = subject.run(batch)
            if not seen:
                continue
            mixture = seen[-1]
            images = len(next(iter(encoder.routing_weights().values())))
            index, _ = subject.samples_of(batch, images)
            with in_place(encoder, merged):
                after = subject.run(batch)
        encoder.strength = 0.0
        try:
            untuned = features_of(subject, batch)
        finally:
            encoder.strength = 1.0
        moved = seen[-1]
        assert untuned is not None
        parts = (mixture, moved - mixture, untuned - mixture)
        squares = torch.stack([part.squares(images).cpu().double() for part in parts])
        answers = _answers(batch, before, after)
        for row in index[index >= 0].unique().tolist():
            of_row = squares[:, index == row].sum(1).tolist()
            for sums in (total, kinds.setdefault(batch.kinds[row], Kind())):
                sums.samples += 1
                sums.squares = [a + b for a, b in zip(sums.squares, of_row, strict=True)]
                if row in answers:
                    same, words, divergence = answers[row]
                    sums.answered, sums.same = sums.answered + 1, sums.same + same
                    sums.words, sums.divergence = sums.words + words, sums.divergence + divergence
    return total.shift(), {kind: sums.shift() for kind, sums in kinds.items() if kind is not None}


def _answers(batch: Batch, before: Any, after: Any) -> dict[int, tuple[bool, int, float]]:
    """Return for each row: whether its most likely words are the same, how many there are, their divergence."""
    ids, logits = batch.inputs.get("input_ids"), getattr(before, "logits", None)
    if ids is None or logits is None or logits.shape[:2] != ids.shape:
        return {}
    places_RL = _answer_places(batch.inputs).to(logits.device)
    found = {}
    for row, places in enumerate(places_RL):
        if places.any():
            one, other = (out.logits[row][places].cpu().double().log_softmax(-1) for out in (before, after))
            divergence = (one.exp() * (one - other)).sum().item()
            found[row] = (bool((one.argmax(-1) == other.argmax(-1)).all()), int(places.sum()), divergence)
    return found


def _answer_places(inputs: Mapping[str, Any]) -> Tensor:
    """Return where the words of answers are predicted, shape `(R, L)`: before labels, else at the end of prompts."""
    labels = inputs.get("labels")
    if labels is not None:
        return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    there = torch.ones_like(ids) if mask is None else mask
    last = (there.long() * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1)
    return torch.arange(ids.shape[1], device=ids.device) == last[:, None]


# Routing


def routing_of(subject: Subject, data: Iterable[Batch]) -> tuple[dict[int, Tensor], list[str | None]]:
    """Return the routing weights of each sample by layer, shape `(N, E)` in float64, and the kinds of the samples.

    A sample of several tiles has their mean.

    Raises:
        ConfigError: If there is no sample with an image.
    """
    found: dict[int, list[Tensor]] = {}
    kinds: list[str | None] = []
    for batch in data:
        with watched(subject, stop=True), contextlib.suppress(Reached):
            subject.run(batch)
        weights = subject.encoder.routing_weights()
        if not weights:
            continue
        index, _ = subject.samples_of(batch, len(next(iter(weights.values()))))
        rows = index[index >= 0].unique().tolist()
        kinds += [batch.kinds[row] for row in rows]
        for layer, weights_BE in weights.items():
            wide = weights_BE.cpu().double()
            found.setdefault(layer, []).extend(wide[index == row].mean(0) for row in rows)
    if not kinds:
        raise ConfigError("The data have no sample with an image.", expected="at least one", got="none")
    return {layer: torch.stack(rows) for layer, rows in found.items()}, kinds


def block_losses(
    subject: Subject, merged: Merged, means: Mapping[int, Sequence[float]], data: Sequence[Batch]
) -> dict[int, BlockLoss]:
    """Measure what each block loses by the mean routing, and by averaged weights.

    Args:
        subject: The model, at rest.
        merged: The merged FFNs, as they would run.
        means: Weights of the average, by layer.
        data: Batches.
    """
    slots = subject.encoder.slots()
    sums = {layer: [0.0, 0.0, 0.0] for layer in slots}  # mixture, loss by routing, loss by averaging

    def measure(layer: int, experts: Any, args: Any, output: Tensor) -> None:
        x, routing, *more = args
        weights = routing.weights_BE
        mean = torch.tensor(means[layer], dtype=weights.dtype, device=weights.device).expand_as(weights)
        fixed = experts.forward(x, Routing(mean), *more)
        one = merged[layer](x, *more)
        parts = (output, fixed - output, one - fixed)
        sums[layer] = [a + b.double().square().sum().item() for a, b in zip(sums[layer], parts, strict=True)]

    handles = [
        slot.experts.register_forward_hook(
            lambda module, args, output, layer=layer: measure(layer, module, args, output)
        )
        for layer, slot in slots.items()
    ]
    try:
        routing, kinds = routing_of(subject, data)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer, (mixture, by_routing, by_averaging) in sums.items():
        mean = torch.tensor(means[layer], dtype=torch.float64)
        found[layer] = BlockLoss(
            weights=tuple(means[layer]),
            deviation=(routing[layer] - mean).square().sum(1).mean().sqrt().item(),
            between_kinds=_between(routing[layer], kinds),
            routing=math.sqrt(by_routing / mixture),
            averaging=math.sqrt(by_averaging / mixture),
        )
    return found


def _between(weights_NE: Tensor, kinds: Sequence[str | None]) -> float | None:
    """Return the share of the variance between kinds; None without kinds, 0 without variance."""
    if None in kinds or len(set(kinds)) < 2:
        return None
    mean = weights_NE.mean(0)
    total = (weights_NE - mean).square().sum().item()
    names = torch.tensor([sorted(set(map(str, kinds))).index(str(kind)) for kind in kinds])
    groups = [weights_NE[names == name] for name in names.unique()]
    between = sum(len(group) * (group.mean(0) - mean).square().sum().item() for group in groups)
    return between / total if total > 1e-12 * len(weights_NE) else 0.0
