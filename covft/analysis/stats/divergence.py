"""How far experts have come apart: in their weights, and in what they make of the same tokens.

Shapes: E experts, D embed_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from covft.analysis.running import Subject, at_rest, subject_of
from covft.analysis.samples import Data, batches
from covft.errors import ConfigError
from covft.integrations.training.monitor import expert_distance
from covft.nn.router import Routing
from covft.utils.arguments import check_kinds, check_sizes

_NUMBERS = 1 << 20  # of each expert's outputs that are in float64 at once


@dataclass(frozen=True)
class Divergence:
    r"""How far the experts of a layer have come apart.

    Attributes:
        weights: $\sqrt{\sum_e |W_e - \bar W|^2 / \sum_e |W_e|^2}$ over weight matrices, as a trainer logs it; None for
            a single expert, and where ZeRO-3 or FSDP1 keeps the weights elsewhere.
        outputs: The same of the experts' outputs, over all tokens of all samples.
        pairs: Distance of the outputs of two experts, $\sqrt{2 |y_a - y_b|^2 / (|y_a|^2 + |y_b|^2)}$, shape `(E, E)`.
        tokens: Number of tokens.
    """

    weights: float | None
    outputs: float
    pairs: np.ndarray
    tokens: int


@check_kinds
def divergence(model: nn.Module, data: Data, *, samples: int = 64, batch_size: int = 16) -> dict[int, Divergence]:
    """Run samples through a tower, and let every expert see every token.

    The tower runs as for `record`; the experts cost as much again as a dense mixture. Memory: the outputs of all
    experts of one layer for one batch, and E x E numbers per layer.

    Args:
        model: As for `record`.
        data: As for `record`.
        samples: Number of samples after which it stops.
        batch_size: Samples that run together.

    Returns:
        The divergence by layer.

    Raises:
        ConfigError: If a setting cannot be used, or the data have no sample with an image.
        UnsupportedViTError: If the tower has no experts.
    """
    check_sizes(samples=samples, batch_size=batch_size)
    subject, seen = subject_of(model), 0
    slots = subject.routed.slots()
    with at_rest(subject), _watching(subject) as sums:
        for batch in batches(data, min(batch_size, samples)):
            subject.run(batch)
            seen += len(batch)
            if seen >= samples:
                break
    if not sums:
        raise ConfigError("The data have no sample with an image.", expected="at least one", got="none")
    return {layer: products.divergence(expert_distance(slots[layer])) for layer, products in sorted(sums.items())}


class _Products:
    """Inner products of the experts' outputs, summed over tokens in float64."""

    def __init__(self, experts: int) -> None:
        self.products_EE = torch.zeros(experts, experts, dtype=torch.float64)
        self.tokens = 0

    def add(self, outputs: list[Tensor]) -> None:
        """Add the outputs of all experts for the same tokens, each of shape `(..., D)`."""
        flat = torch.stack([output.flatten() for output in outputs])
        for part in flat.split(_NUMBERS, dim=1):
            part = part.double()
            self.products_EE += (part @ part.T).cpu()
        self.tokens += outputs[0].numel() // outputs[0].shape[-1]

    def divergence(self, weights: float | None) -> Divergence:
        """Return the distances that follow from the products."""
        products = self.products_EE.numpy()
        squares = np.diagonal(products)
        # |y_e - mean|^2 summed over e, without the outputs: sum_e |y_e|^2 - |sum_e y_e|^2 / E.
        spread = max(squares.sum() - products.sum() / len(products), 0.0)
        total = squares[:, None] + squares[None]
        apart = np.maximum(total - 2 * products, 0)
        pairs = np.sqrt(2 * apart / np.where(total > 0, total, 1))
        np.fill_diagonal(pairs, 0)
        return Divergence(weights, float(np.sqrt(spread / squares.sum())) if squares.sum() else 0.0, pairs, self.tokens)


@contextlib.contextmanager
def _watching(subject: Subject) -> Iterator[dict[int, _Products]]:
    """Let every expert run on the tokens that the mixtures get."""
    sums: dict[int, _Products] = {}

    def watcher(layer: int) -> Callable[..., None]:
        def watch(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens, routing, *rest = args
            rows, count = routing.weights_BE.shape
            outputs = []
            for expert in range(count):
                ids = torch.full((rows, 1), expert, device=tokens.device)
                alone = torch.zeros_like(routing.weights_BE).scatter(1, ids, 1.0)
                outputs.append(experts.forward(tokens, Routing(alone, ids), *rest, **kwargs))  # not its hooks
            sums.setdefault(layer, _Products(count)).add(outputs)

        return watch

    with contextlib.ExitStack() as stack:
        for layer, slot in subject.routed.slots().items():
            hook = slot.experts.register_forward_pre_hook(watcher(layer), with_kwargs=True)
            stack.callback(hook.remove)
        yield sums
