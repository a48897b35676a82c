"""Makes inference with a trained encoder cheaper: low-rank experts and skipped experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # comes with huggingface_hub

from covft.encoder import ContextEncoder
from covft.errors import ConfigError, UnsupportedViTError
from covft.nn.experts import Experts
from covft.nn.low_rank import LowRankExperts
from covft.surgery.packed import packed_weight
from covft.utils.arguments import check_kinds
from covft.utils.parameters import count


@dataclass(frozen=True)
class CompressionReport:
    """The savings and errors of `compress`.

    Attributes:
        rank: Rank of the differences.
        parameters_before: Parameters of all experts before.
        parameters_after: Parameters of all experts after, the shared ones included.
        weight_error: Error of the experts' differences by layer, relative to their norm; 0 for equal experts.
        output_error: Relative error of the experts' outputs for the given call, by layer; empty without a call.
        feature_error: Relative error of the ViT's output for that call; None without a call.
    """

    rank: int
    parameters_before: int
    parameters_after: int
    weight_error: dict[int, float]
    output_error: dict[int, float]
    feature_error: float | None


@check_kinds
@torch.no_grad()
def compress(
    encoder: ContextEncoder, rank: int, images: Any = None, text: Any = None, *, show: bool = False, **kwargs: Any
) -> CompressionReport:
    """Replace trained experts by a shared FFN and low-rank differences, in place.

    Inference becomes cheaper, since the shared products are computed once. The report has the error.

    Args:
        encoder: A wrapped ViT whose experts are copies of the FFN.
        rank: Rank of the differences, such as 64.
        images: Images of a call of the encoder, to measure the error of outputs.
        text: Text of that call.
        show: Whether to show a progress bar; a ViT-L takes some ten seconds.
        **kwargs: Further arguments of that call, such as `grid_thw`.

    Returns:
        Parameters before and after, and errors of weights and outputs.

    Raises:
        ConfigError: If the rank cannot be used.
        UnsupportedViTError: If the experts cannot be compressed; nothing has changed then.
    """
    settings = encoder.covft_config.replace(expert_rank=rank, expert_init="upcycled")
    slots = encoder.slots()
    for layer, slot in slots.items():
        if not isinstance(slot.experts, Experts):
            problem = f"The experts of block {layer} are of low rank already."
            raise UnsupportedViTError(problem, expected="full experts")
        if (packed := packed_weight(slot.experts, "experts")) is not None:
            raise UnsupportedViTError(
                f"The experts of block {layer} are quantised, so their differences are not known.",
                expected="experts in float32, bfloat16 or float16",
                got=packed,
                fix="covft.compress(encoder, rank=...), then quantise what remains",
            )
    full: dict[int, Any] = {layer: slot.experts for layer, slot in slots.items()}
    thin = {
        layer: LowRankExperts.of(list(experts), rank)
        for layer, experts in tqdm(full.items(), desc="compressing", unit="block", disable=not show)
    }
    seen: dict[int, tuple[Tensor, Any, Tensor]] = {}
    features = None if images is None else _observed(encoder, full, images, text, kwargs, seen)
    for layer, slot in slots.items():
        slot.experts = thin[layer]
        slot.set_recompute(settings.recompute)
    encoder.covft_config = settings
    output_error = {layer: _relative(thin[layer](x, routing), y) for layer, (x, routing, y) in seen.items()}
    after = None if images is None else _features(encoder(images, text, **kwargs))
    return CompressionReport(
        rank=rank,
        parameters_before=count(parameter for experts in full.values() for parameter in experts.parameters()),
        parameters_after=count(parameter for experts in thin.values() for parameter in experts.parameters()),
        weight_error={layer: _weight_error(full[layer], thin[layer]) for layer in slots},
        output_error=output_error,
        feature_error=None if features is None or after is None else _relative(after, features),
    )


@check_kinds
def skip_experts(encoder: ContextEncoder, below: float) -> None:
    """Skip experts whose weight for an image is small, in eval mode, and scale up the other weights.

    This is not exact. Low-rank experts cost too little to be skipped.

    Args:
        encoder: A wrapped ViT.
        below: Experts with smaller weights are skipped; 0, the initial value, skips none.

    Raises:
        ConfigError: If it is not in [0, 1 / experts]: some expert has to remain.
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


def _weight_error(full: Any, thin: LowRankExperts) -> float:
    left, total = 0.0, 0.0
    layers = zip(*map(thin.plan.layers, (thin.shared, *full)), strict=True)
    for difference, (mean, *own) in zip(cast(list[Any], thin.differences), layers, strict=True):
        for expert, layer in enumerate(own):
            wanted = layer.weight.float() - mean.weight.float()
            found = difference.up[expert].float() @ difference.down[expert].float()
            left += (wanted - found).square().sum().item()
            total += wanted.square().sum().item()
    return (left / total) ** 0.5 if total else 0.0


def _observed(
    encoder: ContextEncoder, full: Mapping[int, nn.Module], images: Any, text: Any, kwargs: Mapping[str, Any], seen: Any
) -> Tensor | None:
    """Return the ViT's features, and add the inputs and outputs of its experts to `seen`, by layer."""
    handles = [
        experts.register_forward_hook(lambda _, args, output, layer=layer: seen.update({layer: (*args[:2], output)}))
        for layer, experts in full.items()
    ]
    try:
        return _features(encoder(images, text, **kwargs))
    finally:
        for handle in handles:
            handle.remove()


def _features(output: Any) -> Tensor | None:
    output = output[0] if isinstance(output, tuple) else output  # of Qwen3-VL's tower before transformers 5
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "last_hidden_state", None)
    return found if isinstance(found, Tensor) else None


def _relative(found: Tensor, wanted: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.float() - wanted.float())
    return (difference / torch.linalg.vector_norm(wanted.float()).clamp_min(1e-30)).item()
