"""merge(): a plain ViT, or multimodal LLM, in the place of a tuned one."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import nn

from covft.analysis.running import Subject, at_rest
from covft.analysis.samples import Data
from covft.encoder import ContextEncoder
from covft.errors import ConfigError
from covft.integrations.mllm.attachment import attachment_of
from covft.integrations.tuning import tune
from covft.merging.average import averaged, check_mergeable, in_type, install, type_of
from covft.merging.distillation import distil
from covft.merging.measuring import block_losses, prepared, routing_of, shifts
from covft.merging.report import MergeReport
from covft.tuning.tuned import TunedViT
from covft.utils.arguments import check_kinds, check_sizes


@overload
def merge(tuned: nn.Module) -> nn.Module: ...


@overload
def merge(
    tuned: nn.Module,
    data: Data,
    *,
    test: Data | None = None,
    distill: int = 0,
    lr: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    show: bool = False,
) -> tuple[nn.Module, MergeReport]: ...


@check_kinds
def merge(
    tuned: nn.Module,
    data: Data | None = None,
    *,
    test: Data | None = None,
    distill: int = 0,
    lr: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    show: bool = False,
) -> Any:
    r"""Fold what was trained of a tower into its weights, in place: the plain model, for any loader.

    Methods that add the same to every input (`"lora"`, `"full"`, ...) are folded exactly, without data. A mixture of
    experts depends on the input, so nothing can be equal to it. With data it is replaced by what comes close: in each
    adapted block one FFN, whose weights are the average of the experts', $\sum_e \bar g_e W_e$, with the mean routing
    $\bar g$ over the data. That is exact if all experts are equal. Trained norms stay, low-rank updates of attentions
    are added to their weights. The features then do not depend on the text any more.

    Random routing has equal means by its definition, whatever the draw. The data stay in memory meanwhile.

    Args:
        tuned: What `tune`, `wrap` or `attach` returned.
        data: Samples to take the mean routing from, for a mixture of experts alone: an iterable of
            `(images, text)` or `(images, text, kind)`, a `ConversationDataset`, or batches of a multimodal LLM
            with `input_ids`, whose answers are compared, too; see `covft.analysis.samples`. Some hundred of what the
            model will be asked.
        test: Samples that the report is measured on; None takes `data`, which flatters a distilled ViT.
        distill: Steps of distillation: the merged FFNs are trained until the ViT's features come close to the
            mixture's, without labels. A few hundred.
        lr: Peak learning rate of these.
        batch_size: Samples that run together.
        seed: Seed of the order of batches in distillation.
        show: Whether to show the progress of distillation.

    Returns:
        The ViT, or the multimodal LLM with its plain tower; adapters of its language model stay. With data also the
        report: how far features and answers move, and why.

    Raises:
        MergeError: If what the method adds depends on the input, and there are no data to average over; or if experts
            cannot be averaged, as they are not finite, quantised, or changed by other code.
        ConfigError: If data are given for an exact merge, or have no sample with an image.
        UnsupportedViTError: If it is not tuned, distributed, or changed by other code since.

    Example:
        >>> encoder = covft.wrap(covft.testing.ToyViT(), covft.testing.HashTextEncoder(16))  # doctest: +SKIP
        >>> vit, report = covft.merge(encoder, [(images, questions)], distill=300)  # doctest: +SKIP
    """
    attachment = None if isinstance(tuned, ContextEncoder | TunedViT) else attachment_of(tuned)
    encoder = tuned if attachment is None else attachment.encoder
    given = [
        name for name, value in (("data", data), ("test", test), ("distill", distill or None)) if value is not None
    ]
    if given and not isinstance(encoder, ContextEncoder):
        raise ConfigError(
            "Only a mixture of experts is merged with data.",
            expected="covft.merge(tuned), which is exact",
            got=f"{type(encoder).__name__}, {', '.join(given)}",
        )
    if data is None:
        return tune.merge(tuned)
    check_sizes(batch_size=batch_size)
    if distill < 0 or lr <= 0:
        raise ConfigError("This distillation cannot be run.", expected="distill >= 0, lr > 0", got=f"{distill}, {lr}")
    if attachment is not None:
        attachment.check_uncovered("attach()")
    check_mergeable(encoder)
    subject = Subject(tuned if attachment is None else attachment.model, encoder, attachment)
    with at_rest(subject):
        merged, report = _merged(subject, data, test, distill, lr, batch_size, seed, show)
    vit = install(encoder, merged)
    if attachment is None:
        return vit, report
    attachment.remove()
    return tuned, report


def _merged(
    subject: Subject, data: Data, test: Data | None, steps: int, lr: float, size: int, seed: int, show: bool
) -> tuple[Any, MergeReport]:
    encoder, calibration = subject.routed, prepared(subject, data, size)
    seen = calibration if test is None else prepared(subject, test, size)
    routing, _ = routing_of(subject, calibration)
    means = {layer: weights.mean(0).tolist() for layer, weights in routing.items()}
    if encoder.covft_config.routing == "random":
        means = {layer: [1 / len(mean)] * len(mean) for layer, mean in means.items()}
    merged: Any = {layer: averaged(slot.experts, means[layer]) for layer, slot in encoder.slots().items()}
    dtype = type_of(encoder)
    running = in_type(merged, dtype)
    blocks = block_losses(subject, running, means, seen)
    total, kinds = shifts(subject, running, seen)
    if not steps:
        return running, MergeReport(blocks, total, kinds)
    merged = in_type(merged, torch.promote_types(dtype, torch.float32))
    losses = distil(subject, merged, calibration, steps=steps, lr=lr, seed=seed, show=show)
    running = in_type(merged, dtype)
    distilled, kinds = shifts(subject, running, seen)
    return running, MergeReport(blocks, distilled, kinds, total, tuple(losses))
