"""Training steps as a CUDA graph: recorded once, then replayed as one launch instead of two thousand.

The networks of the study are so small that a GPU waits for Python; replayed, a step takes as long as its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # runs that libraries need to choose their kernels and workspaces, as torch's documentation says


class GraphedSteps:
    """Steps of training, each at the next place of some tables; made of the state before the first.

    Args:
        loss_of: Returns the loss of a step from the tensors of its place; it must not wait for values of the device.
        tables: Tensors on a CUDA device whose first axis is the steps.
        groups: Groups for AdamW.
        factors: What the learning rates are multiplied with in each step.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradients.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        tables: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
        factors: Sequence[float],
        *,
        weight_decay: float,
        clip: float,
    ) -> None:
        device = tables[0].device
        self._loss_of, self._tables, self._clip = loss_of, tables, clip
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._factors = torch.tensor(list(factors), device=device)
        self.losses = torch.zeros(len(factors), device=device)
        own = [{**group, "lr": torch.tensor(float(group["lr"]), device=device)} for group in groups]
        self._rates = [(group["lr"], group["lr"].clone()) for group in own]
        self._trained = [parameter for group in own for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(own, weight_decay=weight_decay, fused=True, capturable=True)
        before = [parameter.detach().clone() for parameter in self._trained]
        try:
            self._graph = self._record(min(_WARM_UP, len(factors)))
        finally:
            self._forget(before)

    def _record(self, warm_up: int) -> torch.cuda.CUDAGraph:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(warm_up):
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    @torch.no_grad()
    def _forget(self, before: Sequence[Tensor]) -> None:
        """Undo the steps of the warm-up."""
        for parameter, value in zip(self._trained, before, strict=True):
            parameter.copy_(value)
        for state in self._optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self._place.zero_()
        self.losses.zero_()

    def _step(self) -> None:
        self._optimizer.zero_grad()
        factor = self._factors[self._place][0]
        for rate, base in self._rates:
            rate.copy_(base * factor)
        loss = self._loss_of(*(table[self._place][0] for table in self._tables))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        self.losses.index_copy_(0, self._place, loss.detach()[None])
        self._place.add_(1)

    def __call__(self) -> None:
        """Train one step."""
        self._graph.replay()


def graphed(loss_of: Callable[..., Tensor], tables: Sequence[Tensor], *args: Any, **kwargs: Any) -> GraphedSteps | None:
    """Record steps, as `GraphedSteps`; None where that cannot be done: on a CPU, or if a step waits for the device."""
    if not tables[0].is_cuda:
        return None
    try:
        return GraphedSteps(loss_of, tables, *args, **kwargs)
    except RuntimeError:  # such as sparse routing, which picks rows by their values
        torch.cuda.synchronize()
        return None
