"""A step as a CUDA graph: recorded once, then replayed as one launch instead of a thousand.

The networks of the study are so small that a GPU waits for Python; replayed, a step takes as long as its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[..., Tensor]
_WARM_UP = 3  # runs that libraries need to choose their kernels and workspaces, as torch's documentation says


class GraphedStep:
    """Forward and backward of a step whose inputs have the same shapes each time.

    Args:
        step: Returns the loss, from tensors on a CUDA device; it must not wait for values of the device.
        inputs: Inputs of a first step.
        trained: Parameters, whose gradients each call overwrites.
    """

    def __init__(self, step: Step, inputs: Sequence[Tensor], trained: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                step(*self._inputs).backward()
        torch.cuda.current_stream().wait_stream(aside)
        for parameter in trained:
            parameter.grad = None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = step(*self._inputs)
            self._loss.backward()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run forward and backward; return the loss, which the next call overwrites."""
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._loss


def graphed(step: Step, inputs: Sequence[Tensor], trained: Sequence[Tensor]) -> Step | None:
    """Record a step; None where that cannot be done: on another device, or if the step waits for values of the device.

    Args:
        step: As for `GraphedStep`.
        inputs: As for `GraphedStep`.
        trained: As for `GraphedStep`.
    """
    if not inputs[0].is_cuda:
        return None
    try:
        return GraphedStep(step, inputs, trained)
    except RuntimeError:  # such as sparse routing, which picks rows by their values
        torch.cuda.synchronize()
        for parameter in trained:
            parameter.grad = None
        return None
