"""One FFN in the place of each mixture: the average of its experts, and where that stands in the ViT.

Shapes: E experts, Q rank.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from covft.encoder import ContextEncoder
from covft.errors import MergeError
from covft.nn.experts import Experts
from covft.nn.low_rank import LowRankDifference, LowRankExperts
from covft.surgery.attention import updates_of
from covft.surgery.split import SplitFFN
from covft.utils.sharding import assign, full
from covft.wrapping import check_unwrap, unwrap

Merged = Mapping[int, nn.Module]
"""The FFN of each adapted block, by layer."""


def check_mergeable(encoder: ContextEncoder) -> None:
    """Refuse an encoder whose experts cannot be averaged; nothing is changed.

    Raises:
        UnsupportedViTError: If it cannot be unwrapped.
        MergeError: If it runs with something that an average would leave out.
    """
    check_unwrap(encoder, "merge()")
    if encoder.strength != 1:
        problem = "At a strength below 1 the pretrained FFNs run beside the experts."
        raise MergeError(problem, expected="strength 1", got=encoder.strength, fix="encoder.strength = 1")
    for layer, slot in encoder.slots().items():
        if isinstance(slot.experts, Experts) and slot.experts.skip_below:
            problem = "Experts of small weight are skipped, so the routing is not what the router says."
            raise MergeError(problem, got=f"{slot.experts.skip_below:g}", fix="covft.skip_experts(encoder, 0)")
        names = set(_original(encoder, layer).state_dict())
        for expert in _modules(slot.experts):
            _check_plain(expert, names, layer)
    there = dict(encoder.vit.named_parameters())
    if missing := [name for name in encoder.norms if name not in there]:
        raise MergeError("Trained norms are not where wrap() left them.", got=", ".join(missing[:3]))
    for path in updates_of(encoder.vit):
        weight = cast(Any, encoder.vit.get_submodule(path)).weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise MergeError(
                f"The update of {path} cannot be added to a weight of another kind.", got=type(weight).__name__
            )


def averaged(experts: Experts | LowRankExperts, weights_E: Sequence[float]) -> nn.Module:
    """Return one FFN whose weights are the average of the experts'; exactly an expert's, where all are equal.

    Args:
        experts: The experts.
        weights_E: Weight of each; they sum to 1.
    """
    ffn = copy.deepcopy(experts.prototype).requires_grad_(False)
    with torch.no_grad():
        if isinstance(experts, LowRankExperts):
            layers = zip(experts.plan.layers(ffn), cast(Any, experts.differences), strict=True)
            for layer, difference in layers:
                _add_low_rank(layer, difference, weights_E)
            return ffn
        states = [expert.state_dict() for expert in experts]
        for name, tensor in ffn.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(_mean([state[name] for state in states], weights_E))
    return ffn


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the first tensor plus the average difference from it: of equal tensors, the same bits."""
    first = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32))
    return first + sum(weight * (other.to(first.dtype) - first) for weight, other in zip(weights, tensors, strict=True))


def _add_low_rank(layer: Any, difference: LowRankDifference, weights: Sequence[float]) -> None:
    for expert, weight in enumerate(weights):
        layer.weight += weight * (difference.up[expert] @ difference.down[expert])
        if difference.bias is not None:
            layer.bias += weight * difference.bias[expert]


def in_type(merged: Merged, dtype: torch.dtype) -> Merged:
    """Return the FFNs in a floating-point type; themselves, if they have it."""
    same = all(p.dtype == dtype for ffn in merged.values() for p in ffn.parameters() if p.is_floating_point())
    return merged if same else {layer: copy.deepcopy(ffn).to(dtype) for layer, ffn in merged.items()}


def type_of(encoder: ContextEncoder) -> torch.dtype:
    """Return the type that the FFNs have after unwrapping."""
    slot = next(iter(encoder.slots().values()))
    own = next(p.dtype for p in slot.experts.parameters() if p.is_floating_point())
    return encoder.original.type_in(encoder.vit) or own


@contextlib.contextmanager
def in_place(encoder: ContextEncoder, merged: Merged) -> Iterator[None]:
    """While open, the merged FFNs run where the mixtures stand.

    Args:
        encoder: The wrapped ViT.
        merged: The FFNs, by layer.
    """
    vit = encoder.vit
    places = _places(encoder, merged)
    before = {path: vit.get_submodule(path) for path in places}
    try:
        for path, ffn in places.items():
            vit.set_submodule(path, ffn)
        yield
    finally:
        for path, slot in before.items():
            vit.set_submodule(path, slot)


def install(encoder: ContextEncoder, merged: Merged) -> nn.Module:
    """Unwrap the ViT, and give it the merged FFNs, the trained norms, and the updates of attentions.

    Args:
        encoder: The wrapped ViT, which `check_mergeable` has accepted.
        merged: The FFNs, by layer.

    Returns:
        The plain ViT.
    """
    vit = encoder.vit
    ffns = {path: ffn.state_dict() for path, ffn in _places(encoder, merged).items()}
    norms = {name: full(vit.get_parameter(name)).clone() for name in encoder.norms}
    with torch.no_grad():
        updates = {path: update.weight() for path, update in updates_of(vit).items()}
        unwrap(encoder)
        for path, state in ffns.items():
            vit.get_submodule(path).load_state_dict(state)
        for name, value in norms.items():
            assign(vit.get_parameter(name), value)
        for path, weight in updates.items():
            linear: Any = vit.get_submodule(path)
            linear.weight += weight.to(linear.weight.dtype)
    return vit


def _places(encoder: ContextEncoder, merged: Merged) -> dict[str, nn.Module]:
    """Return the module for each path of the ViT where the FFN of an adapted block, or a half of it, stands."""
    found: dict[str, nn.Module] = {}
    for layer, ffn in merged.items():
        block = encoder.spec.blocks[layer]
        first = ffn.intermediate if isinstance(ffn, SplitFFN) else ffn
        found.update(dict.fromkeys((block.mlp_path, *block.aliases), first))
        if block.output_path is not None:
            found[block.output_path] = cast(SplitFFN, ffn).output
    return found


def _original(encoder: ContextEncoder, layer: int) -> nn.Module:
    block, ffns = encoder.spec.blocks[layer], encoder.original.ffns
    if block.output_path is None:
        return ffns[block.mlp_path]
    return SplitFFN(ffns[block.mlp_path], ffns[block.output_path])


def _modules(experts: Experts | LowRankExperts) -> list[nn.Module]:
    return [experts.shared] if isinstance(experts, LowRankExperts) else list(experts)


def _check_plain(expert: nn.Module, names: set[str], layer: int) -> None:
    parameters = list(expert.parameters())
    if set(expert.state_dict()) != names or any(type(p) is not nn.Parameter for p in parameters):
        raise MergeError(
            f"The experts of block {layer} are not the FFN's copies any more, so their weights have no average.",
            expected="ordinary parameters with the FFN's names: no adapters, no quantisation",
            got=", ".join(sorted(set(expert.state_dict()) ^ names)[:3]) or type(parameters[0]).__name__,
        )
    if not all(bool(p.isfinite().all()) for p in parameters if p.is_floating_point()):
        raise MergeError(f"Experts of block {layer} are not finite.", expected="finite values", got="nan or inf")
