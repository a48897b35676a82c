"""Runs a tower to look at it, and leaves no trace: no hooks, no modes, no records, no random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covft.analysis.samples import Batch
from covft.encoder import ContextEncoder
from covft.errors import ShapeError, UnsupportedViTError
from covft.integrations.mllm.attachment import Attachment, attachment_of
from covft.surgery.adapted import AdaptedViT
from covft.surgery.slot import AdaptedFFN
from covft.utils.modes import in_eval_mode
from covft.utils.torch_internals import eagerly, uncompiled


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        model: The model, without wrappers of DDP and `torch.compile`.
        encoder: Its tower: a `ContextEncoder` or a `TunedViT`.
        attachment: What connects the two in a multimodal LLM; None for a tower alone.
    """

    model: nn.Module
    encoder: Any
    attachment: Attachment | None

    @property
    def routed(self) -> ContextEncoder:
        """The tower, if it has experts.

        Raises:
            UnsupportedViTError: If it has none, so that there is no routing.
        """
        if isinstance(self.encoder, ContextEncoder):
            return self.encoder
        raise UnsupportedViTError(
            "This tower has no experts, so there is no routing to record.",
            expected="a tower of covft.wrap(...) or covft.attach(...)",
            got=self.encoder.adapted,
            fix='covft.tune(vit, "covft", text_encoder=...)',
        )

    def run(self, batch: Batch) -> Any:
        """Run the tower on a batch; the language model too, where only it can read the batch."""
        for slot in slots_of(self.encoder):
            slot.record = None  # a batch without images leaves none
        weight = next(p for p in self.encoder.parameters() if p.is_floating_point())
        if batch.images is not None:
            images = batch.images.to(weight.device, weight.dtype if batch.images.is_floating_point() else None)
            # One text each is given without an index: beams and the like have none either.
            index = None if len(batch) == len(images) else batch.index
            return self.encoder(images, batch.text, index=None if batch.text is None else index)
        inputs = {name: _moved(value, weight) for name, value in batch.inputs.items()}
        if self.attachment is not None:
            return self.model(**inputs)
        text, index = inputs.pop("context_text", None), inputs.pop("context_index", None)
        return self.encoder(text=text, index=index, **inputs)

    def samples_of(self, batch: Batch, rows: int) -> tuple[Tensor, dict[int, Any]]:
        """Return which sample of a batch each row of the tower is of, -1 for none, and the text of each sample.

        Args:
            batch: What has run.
            rows: Rows that the tower saw, images or tiles.

        Raises:
            ShapeError: If that cannot be known.
        """
        index, texts = batch.index, dict(enumerate(batch.texts))
        if batch.images is None and self.attachment is not None:
            index, texts = self.attachment.rows_of_tower(batch.inputs)
        if (flags := batch.inputs.get("image_flags")) is not None:
            index = index.masked_fill(~torch.as_tensor(flags, device=index.device).bool(), -1)
        if len(index) != rows:
            raise ShapeError(
                "The tower sees other images than those of the batch, so which sample each is of is not known.",
                expected=f"{len(index)} images or tiles",
                got=f"{rows}",
                fix="context_index=, the sample of each image or tile, in the batch",
            )
        return index.cpu(), texts


def subject_of(model: nn.Module) -> Subject:
    """Find the tower of a model.

    Args:
        model: A wrapped or tuned ViT, an attached multimodal LLM, or either inside DDP or `torch.compile`.

    Raises:
        UnsupportedViTError: If there is none, or several.
    """
    inner = _without_wrappers(model)
    if isinstance(inner, AdaptedViT):
        return Subject(inner, inner, None)
    if (attachment := attachment_of(inner)) is not None:
        return Subject(inner, attachment.encoder, attachment)
    found = [module for module in inner.modules() if isinstance(module, AdaptedViT)]
    if len(found) == 1:
        return Subject(found[0], found[0], None)
    raise UnsupportedViTError(
        f"This {type(inner).__name__} has {len(found) or 'no'} context-aware towers.",
        expected="a tower of covft.wrap or covft.tune, or a model of covft.attach",
        got=type(inner).__name__,
        fix="covft.wrap(vit, text_encoder), or covft.attach(model, text_encoder, tokenizer=tokenizer)",
    )


@contextlib.contextmanager
def at_rest(subject: Subject) -> Iterator[None]:
    """Run a model as for evaluation: no gradients, eval mode, not compiled; then everything is as it was.

    Args:
        subject: What is run.
    """
    slots = slots_of(subject.encoder)
    records = [slot.record for slot in slots]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(eagerly())
            stack.enter_context(in_eval_mode(subject.model))
            yield
    finally:
        for slot, record in zip(slots, records, strict=True):
            slot.record = record


def slots_of(encoder: Any) -> list[AdaptedFFN]:
    """Return the adapted FFNs of a tower; none of a tower without experts."""
    return list(encoder.slots().values()) if isinstance(encoder, ContextEncoder) else []


def _moved(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _without_wrappers(model: nn.Module) -> nn.Module:
    while True:
        inner = uncompiled(model)
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        if inner is model:
            return model
        model = inner
