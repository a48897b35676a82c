"""Time, bytes and floating-point operations of functions that are compared with one another."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Timing:
    """Seconds of one function, over several runs.

    Attributes:
        median: The middle run.
        best: The fastest run.
        runs: All runs.
    """

    median: float
    best: float
    runs: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(functions: dict[str, Callable[[], Any]], runs: int = 5, warm_up: int = 1) -> dict[str, Timing]:
    """Time functions in turns, so that whatever the machine does besides meets all of them alike.

    Args:
        functions: By name.
        runs: Measured runs of each.
        warm_up: Runs of each before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(warm_up + runs):
        for name, function in functions.items():
            gc.collect()
            _synchronise()
            start = time.perf_counter()
            function()
            _synchronise()
            if run >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(all_), min(all_), all_) for name, all_ in seconds.items()}


def bytes_for_backward(function: Callable[[], Any], besides: Iterable[Tensor] = ()) -> int:
    """What autograd keeps of a forward, in bytes; each storage counts once.

    Args:
        function: Runs the forward, and returns its output.
        besides: Tensors that are there anyway, such as parameters.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    total = sum(kept.values())
    del output
    return total


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of a function: two per multiplication and addition of matrix products.

    Args:
        function: Anything that runs on tensors.
    """
    # The counter sees nothing of the fused attention that CPUs have.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
