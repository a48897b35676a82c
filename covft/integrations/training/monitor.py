"""Summarises the routing between two log entries in a few numbers."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from covft.encoder import ContextEncoder
from covft.nn.low_rank import LowRankExperts
from covft.surgery.slot import AdaptedFFN
from covft.utils.sharding import is_distributed, is_partitioned

# Relative distance up to which experts count as equal: rounding alone gives about 1e-7 in float32.
EQUAL = 1e-6


@dataclass
class RoutingMonitor:
    """Accumulates the routing of a tower, on its device, until the figures are read.

    Attributes:
        encoder: The tower.
        per_layer: Whether to give figures of each adapted block, in addition to their means.
        patience: Optimizer steps after which experts that are still equal are a reason to warn.
    """

    encoder: ContextEncoder
    per_layer: bool = False
    patience: int = 100
    _sums: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _gates: list[Tensor] = field(default_factory=list, repr=False)
    _balance: list[Tensor] = field(default_factory=list, repr=False)
    _distance: float | None = field(default=None, repr=False)

    def note_routing(self) -> None:
        """Add the last forward: number of images, entropy, expert load, load-balancing loss."""
        for layer, weights_BE in self.encoder.routing_weights().items():
            weights_BE = weights_BE.float()
            entropy = torch.special.entr(weights_BE).sum()
            noted = torch.cat([weights_BE.new_tensor([len(weights_BE)]), entropy[None], weights_BE.sum(dim=0)])
            self._sums[layer] = noted if layer not in self._sums else self._sums[layer] + noted
        if self.encoder.covft_config.routing == "sparse" and self._sums:
            self._balance.append(self.encoder.aux_loss().detach().float())

    def note_gates(self) -> None:
        """Add the gradient norm of each layer's gate."""
        norms = [_gradient_norm(slot.router) for slot in self.encoder.slots().values()]
        norms = [norm for norm in norms if norm is not None]
        if norms:
            self._gates.append(torch.stack(norms))

    def figures(self) -> dict[str, float]:
        """Return the figures since the last call, averaged over all processes, by the names of their log entries.

        `covft/routing_entropy` in nats (log E for equal weights, 0 for a single expert), `covft/expert_load_max` and
        `_min` (share of the most and the least used expert), `covft/gate_grad_norm`, the norm after clipping,
        `covft/expert_distance` (see `expert_distance`) and, with sparse routing, `covft/load_balance_loss`, without its
        factor and of this process. All processes have to call this together.
        """
        found: dict[str, float] = {}
        layers = self.encoder.layers
        sums = _over_processes(torch.stack([self._sums.get(layer, self._nothing()) for layer in layers])).cpu()
        if bool((sums[:, 0] > 0).all()):
            means = sums[:, 1:] / sums[:, :1]
            entropies, loads = means[:, 0], means[:, 1:]
            found["covft/routing_entropy"] = entropies.mean().item()
            found["covft/expert_load_max"] = loads.max(dim=1).values.mean().item()
            found["covft/expert_load_min"] = loads.min(dim=1).values.mean().item()
            for row, layer in enumerate(layers if self.per_layer else ()):
                found[f"covft/layer_{layer}/routing_entropy"] = entropies[row].item()
                for expert, load in enumerate(loads[row].tolist()):
                    found[f"covft/layer_{layer}/expert_load_{expert}"] = load
        if self._gates:
            gates = torch.stack(self._gates).mean(dim=0).cpu()
            found["covft/gate_grad_norm"] = gates.mean().item()
            for row, layer in enumerate(layers if self.per_layer else ()):
                found[f"covft/layer_{layer}/gate_grad_norm"] = gates[row].item()
        if self._balance:
            found["covft/load_balance_loss"] = torch.stack(self._balance).mean().item()
        distances = {layer: expert_distance(slot) for layer, slot in self.encoder.slots().items()}
        known = {layer: distance for layer, distance in distances.items() if distance is not None}
        if known:
            self._distance = found["covft/expert_distance"] = sum(known.values()) / len(known)
            if self.per_layer:
                found.update({f"covft/layer_{layer}/expert_distance": value for layer, value in known.items()})
        self._sums, self._gates, self._balance = {}, [], []
        return found

    def check_separation(self, step: int) -> None:
        """Warn once if the experts should have come apart by now and have not.

        Args:
            step: Optimizer steps so far.
        """
        trained = any(p.requires_grad for slot in self.encoder.slots().values() for p in slot.experts.parameters())
        routed = self.encoder.covft_config.routing != "uniform"  # whose experts always get equal gradients
        if step < self.patience or self._distance is None or self._distance > EQUAL or not (trained and routed):
            return
        self.patience = sys.maxsize
        warnings.warn(
            f"The experts are still equal after {step} steps (relative distance {self._distance:.1e}), so the routing "
            "has no effect. Reasons: all images share one text, weights in bfloat16 round the updates away "
            "(train_only(..., dtype=torch.float32)), or the learning rate is 0.",
            UserWarning,
            stacklevel=2,
        )

    def log(self, logs: dict[str, float] | None, state: Any) -> None:
        """Add the figures to a trainer's log entry, so that later callbacks see them, too.

        Args:
            logs: The entry that `on_log` gets.
            state: The trainer's state, which keeps a copy of the entry.
        """
        figures = self.figures()
        if figures and logs is not None:
            logs.update(figures)
            state.log_history[-1].update(figures)

    def _nothing(self) -> Tensor:
        device = next(self.encoder.parameters()).device
        return torch.zeros(2 + self.encoder.covft_config.experts, device=device)


@torch.no_grad()
def expert_distance(slot: AdaptedFFN) -> float | None:
    r"""Return how far the experts of a block have come apart, relative to the size of their weights.

    $\sqrt{\sum_e |W_e - \bar W|^2 / \sum_e |W_e|^2}$ over the weight matrices; 0 for equal experts. Experts of low rank
    are compared by their differences from the FFN that they share. All processes have to call this together.

    Args:
        slot: An adapted FFN.

    Returns:
        The distance; None for a single expert, and where ZeRO-3 or FSDP1 keeps the weights elsewhere.
    """
    experts = slot.experts
    if len(experts) < 2 or any(is_partitioned(parameter) for parameter in experts.parameters()):
        return None
    if isinstance(experts, LowRankExperts):
        base = [p for p in experts.shared.parameters() if p.dim() == 2]
        apart = [_spread(list(torch.bmm(d.up.float(), d.down.float()))) for d in experts.differences]  # type: ignore[operator, union-attr]
        size = len(experts) * _squares(base)
    else:
        matrices = [[p for p in expert.parameters() if p.dim() > 1] for expert in experts]
        apart = [_spread(list(same)) for same in zip(*matrices, strict=False)]
        size = sum(_squares(own) for own in matrices)
    return math.sqrt(sum(apart) / size) if size else None


def _spread(tensors: list[Tensor]) -> float:
    """Return the sum of squared distances from the mean."""
    mean = sum(tensor.float() for tensor in tensors) / len(tensors)
    return _squares([tensor.float() - mean for tensor in tensors])


def _squares(tensors: list[Any]) -> float:
    if not tensors:
        return 0.0
    norms = [torch.linalg.vector_norm(tensor.detach().float()) for tensor in tensors]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]  # of an FSDP shard
    return torch.stack(norms).square().sum().item()


def _gradient_norm(router: nn.Module) -> Tensor | None:
    gradients = [parameter.grad for parameter in router.parameters() if parameter.grad is not None]
    if not gradients:
        return None
    norms = [torch.linalg.vector_norm(gradient.detach()) for gradient in gradients]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]  # of an FSDP shard
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def _over_processes(sums: Tensor) -> Tensor:
    if is_distributed():
        torch.distributed.all_reduce(sums)
    return sums
