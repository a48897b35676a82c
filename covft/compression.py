"""Makes a trained encoder cheaper at inference: low-rank experts, and experts that are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # comes with huggingface_hub

from covft.encoder import ContextEncoder
from covft.errors import ConfigError, UnsupportedViTError
from covft.nn.experts import Experts
from covft.nn.low_rank import LowRankDifference, LowRankExperts


@dataclass(frozen=True)
class CompressionReport:
    """What compressing cost and saved.

    Attributes:
        rank: Rank of the differences.
        parameters_before: Parameters of all experts before.
        parameters_after: Parameters of all experts after, what they share included.
        weight_error: Per layer, how much of the experts' differences is lost: the norm of what is left over that of
            the differences; 0 where the experts were equal.
        output_error: Per layer, the relative error of what the experts make of the tokens of a given call; empty if
            none was given.
        feature_error: The relative error of what the ViT returns for that call; None if none was given.
    """

    rank: int
    parameters_before: int
    parameters_after: int
    weight_error: dict[int, float]
    output_error: dict[int, float]
    feature_error: float | None


@torch.no_grad()
def compress(
    encoder: ContextEncoder, rank: int, images: Any = None, text: Any = None, *, show: bool = False, **kwargs: Any
) -> CompressionReport:
    """Store trained experts as one FFN that they share and differences of low rank, in place.

    Inference becomes cheaper: the shared products are computed once. The report says what is lost.

    Args:
        encoder: A wrapped ViT whose experts are copies of the FFN.
        rank: Rank of the differences, such as 64.
        images: As for calling the encoder, to measure the error of outputs.
        text: As for calling the encoder.
        show: Whether to show a progress bar; a ViT-L takes some ten seconds.
        **kwargs: As for calling the encoder, such as `grid_thw`.

    Returns:
        Parameters before and after, and errors of weights and outputs.

    Raises:
        ConfigError: If the rank cannot be used.
        UnsupportedViTError: If the experts cannot be compressed; nothing has changed then.
    """
    settings = dataclasses.replace(encoder.covft_config, expert_rank=rank)
    slots = encoder.slots()
    for layer, slot in slots.items():
        if not isinstance(slot.experts, Experts):
            raise UnsupportedViTError(
                f"The experts of block {layer} are of low rank already.", expected="whole experts"
            )
    thin = {
        layer: LowRankExperts.of(list(slot.experts), rank)  # type: ignore[arg-type]
        for layer, slot in tqdm(slots.items(), desc="compressing", unit="block", disable=not show)
    }
    whole = {layer: slot.experts for layer, slot in slots.items()}
    before = sum(parameter.numel() for experts in whole.values() for parameter in experts.parameters())
    weight_error = {layer: _weight_error(whole[layer], thin[layer]) for layer in slots}
    seen: dict[int, tuple[Tensor, Any, Tensor]] = {}
    features = None if images is None else _observed(encoder, whole, images, text, kwargs, seen)
    for layer, slot in slots.items():
        slot.experts = thin[layer]
    encoder.covft_config = settings
    output_error = {layer: _relative(thin[layer](x, routing), y) for layer, (x, routing, y) in seen.items()}
    after = None if images is None else _features(encoder(images, text, **kwargs))
    return CompressionReport(
        rank=rank,
        parameters_before=before,
        parameters_after=sum(parameter.numel() for experts in thin.values() for parameter in experts.parameters()),
        weight_error=weight_error,
        output_error=output_error,
        feature_error=None if features is None or after is None else _relative(after, features),
    )


def skip_experts(encoder: ContextEncoder, below: float) -> None:
    """Skip experts whose weight for an image is small, in eval mode; the other weights are scaled up.

    Not exact, and off (0) unless asked for. Low-rank experts cost too little to be skipped.

    Args:
        encoder: A wrapped ViT.
        below: Experts with smaller weights are skipped; 0 skips none.

    Raises:
        ConfigError: If it is not in [0, 1 / experts]: some expert has to be left.
    """
    most = 1 / encoder.covft_config.experts
    if not 0 <= below <= most:
        raise ConfigError(
            f"below={below} could leave an image without any expert.",
            expected=f"0 to {most:g}  ({encoder.covft_config.experts} experts)",
            got=below,
        )
    for slot in encoder.slots().values():
        if isinstance(slot.experts, Experts):
            slot.experts.skip_below = below


def _weight_error(whole: Any, thin: LowRankExperts) -> float:
    theirs = [thin.plan.weights(expert) for expert in whole]
    means = thin.plan.weights(thin.shared)
    left, total = 0.0, 0.0
    for layer, difference in enumerate(thin.differences):
        assert isinstance(difference, LowRankDifference)
        mean = means[2 * layer]
        for expert, own in enumerate(theirs):
            weight = own[2 * layer]
            assert weight is not None
            assert mean is not None
            wanted = weight.float() - mean.float()
            found = difference.up[expert].float() @ difference.down[expert].float()
            left += (wanted - found).square().sum().item()
            total += wanted.square().sum().item()
    return (left / total) ** 0.5 if total else 0.0


def _observed(
    encoder: ContextEncoder,
    whole: Mapping[int, nn.Module],
    images: Any,
    text: Any,
    kwargs: Mapping[str, Any],
    seen: dict[int, tuple],
) -> Tensor | None:
    """What the ViT returns, and what goes into its experts and comes out of them."""
    handles = [
        experts.register_forward_hook(lambda _, args, output, layer=layer: seen.update({layer: (*args[:2], output)}))
        for layer, experts in whole.items()
    ]
    try:
        return _features(encoder(images, text, **kwargs))
    finally:
        for handle in handles:
            handle.remove()


def _features(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "last_hidden_state", None)
    return found if isinstance(found, Tensor) else None


def _relative(found: Tensor, wanted: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.float() - wanted.float())
    return (difference / torch.linalg.vector_norm(wanted.float()).clamp_min(1e-30)).item()
