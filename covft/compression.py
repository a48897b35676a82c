"""Trained experts, stored as one FFN that all share and low-rank differences from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # comes with huggingface_hub

from covft.errors import UnsupportedViTError
from covft.nn.experts import Experts
from covft.nn.low_rank import LowRankDifference, LowRankExperts

if TYPE_CHECKING:
    from covft.encoder import ContextEncoder


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
    """Compress the experts; see `ContextEncoder.compress`.

    Args:
        encoder: A wrapped ViT with whole experts.
        rank: Rank of the differences.
        images: To measure errors on.
        text: To measure errors on.
        show: Whether to show a progress bar.
        **kwargs: Handed on to the ViT with the images.

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
