"""Summarises the routing between two log entries in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from covft.encoder import ContextEncoder
from covft.utils.sharding import is_distributed


@dataclass
class RoutingMonitor:
    """Accumulates the routing of a tower, on its device, until the figures are read.

    Attributes:
        encoder: The tower.
        per_layer: Whether to give figures of each adapted block, in addition to their means.
    """

    encoder: ContextEncoder
    per_layer: bool = False
    _sums: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _gates: list[Tensor] = field(default_factory=list, repr=False)

    def note_routing(self) -> None:
        """Add the last forward: number of images, entropy, expert load."""
        for layer, weights_BE in self.encoder.routing_weights().items():
            weights_BE = weights_BE.float()
            entropy = torch.special.entr(weights_BE).sum()
            noted = torch.cat([weights_BE.new_tensor([len(weights_BE)]), entropy[None], weights_BE.sum(dim=0)])
            self._sums[layer] = noted if layer not in self._sums else self._sums[layer] + noted

    def note_gates(self) -> None:
        """Add the gradient norm of each layer's gate."""
        norms = [_gradient_norm(slot.router) for slot in self.encoder.slots().values()]
        norms = [norm for norm in norms if norm is not None]
        if norms:
            self._gates.append(torch.stack(norms))

    def figures(self) -> dict[str, float]:
        """Return the figures since the last call, averaged over all processes, by the names of their log entries.

        `covft/routing_entropy` in nats (log E for equal weights, 0 for a single expert), `covft/expert_load_max` and
        `_min` (share of the most and the least used expert) and `covft/gate_grad_norm`, the norm after clipping. All
        processes have to call this together.
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
        self._sums, self._gates = {}, []
        return found

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
