"""Adds the load-balancing loss of sparse routing to the loss that a model returns, as transformers' Mixtral does.

A loss in `outputs.loss` reaches every loop: transformers' Trainer, TRL, the codebases and loops of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from covft.encoder import ContextEncoder
from covft.integrations.mllm.attachment import Attachment
from covft.nn.losses import load_balance_loss
from covft.surgery.overrides import Override


def call_with_balance_loss(attachment: Attachment, call: Callable[[], Any], given: Mapping[str, Any]) -> Any:
    """Call a model and add the load-balancing loss of the images in this call to its loss.

    Nothing is added in eval mode, without gradients, where the tower did not run or the model returned no loss. A
    recomputation during backward does not come through here.

    Args:
        attachment: The attached model.
        call: Calls it.
        given: Arguments of the call, by name.

    Returns:
        What the model returned.
    """
    routed = attachment.routed
    if routed is None or not (wants_balance(attachment) and attachment.model.training and torch.is_grad_enabled()):
        return call()
    if attachment.balancing:
        return call()  # inside another override of the same model, which adds it
    slots = routed.slots().values()
    before = [slot.record for slot in slots]
    attachment.balancing = True
    try:
        output = call()
    finally:
        attachment.balancing = False
    records = [slot.record for slot, old in zip(slots, before, strict=True) if slot.record is not old]
    routings = [record.routing for record in records if record is not None]
    real = given.get("image_flags")
    real = None if real is None else torch.as_tensor(real).flatten().bool()
    losses = [_of_real_images(routing.logits_BE, routing.expert_ids_BK, real) for routing in routings]
    found = [loss for loss in losses if loss is not None]
    if not found:
        return output
    added = _factor(routed) * _share(given) * torch.stack(found).mean()
    return _added(output, added, attachment)


def wants_balance(attachment: Attachment) -> bool:
    """Return whether the settings of an attached model ask for the load-balancing loss."""
    routed = attachment.routed
    return routed is not None and routed.covft_config.routing == "sparse" and _factor(routed) > 0


def _factor(routed: ContextEncoder) -> float:
    return routed.covft_config.router_aux_loss_coef


class LossOverride(Override):
    """Overrides the `forward` of a model that something else runs, and adds the load-balancing loss."""

    def __init__(self, attachment: Attachment, name: str = "forward") -> None:
        self.attachment = attachment
        super().__init__(self.owner, name)

    @property
    def owner(self) -> Any:
        """The model."""
        return self.attachment.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        args = self._own(args)
        given = self._named(args, kwargs)
        return call_with_balance_loss(self.attachment, lambda: self.inner(*args, **kwargs), given)


def _of_real_images(logits_BE: Tensor | None, ids_BK: Tensor | None, real: Tensor | None) -> Tensor | None:
    """Return the loss of one layer without dummy images; None if there are no others, or nothing to train."""
    if logits_BE is None or ids_BK is None or not logits_BE.requires_grad:
        return None
    if real is not None and len(real) == len(logits_BE) and not bool(real.all()):
        kept = real.to(logits_BE.device)
        logits_BE, ids_BK = logits_BE[kept], ids_BK[kept]
    return load_balance_loss(logits_BE, ids_BK) if len(logits_BE) else None


def _share(given: Mapping[str, Any]) -> Any:
    """Return the share of this call in the optimizer step, where the caller already divides the loss by its tokens.

    With `num_items_in_batch`, the Trainer sums the losses of micro-batches and processes instead of averaging them.
    """
    total = given.get("num_items_in_batch")
    shifted, labels = given.get("shift_labels"), given.get("labels")
    answers = labels[..., 1:] if shifted is None and labels is not None else shifted
    if total is None or answers is None:
        return 1.0
    return (answers != -100).sum() / total


def _added(output: Any, added: Tensor, attachment: Attachment) -> Any:
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() == 0:
        attachment.balanced = True
        return (output[0] + added.to(output[0]), *output[1:])
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        attachment.balanced = True
        if isinstance(output, dict):  # a ModelOutput is one, too
            output["loss"] = loss + added.to(loss)
        else:
            output.loss = loss + added.to(loss)  # type: ignore[union-attr]
    return output
