"""Time, bytes and floating-point operations of functions to compare."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_SAMPLE = 0.02  # seconds


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


def interleaved(
    functions: dict[str, Callable[[], Any]], runs: int = 5, warm_up: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Time functions in turns, so that other load of the machine affects all of them alike.

    Args:
        functions: By name.
        runs: Measured runs of each.
        warm_up: Unmeasured runs of each, before.
        device: Where they run; a GPU is timed by its own events, over as many calls as take 20 ms.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    if device.startswith("cuda"):
        warm_up = max(warm_up, 3)  # libraries choose and load their kernels in the first calls
    for run in range(warm_up + runs):
        gc.collect(1)  # what the runs before left; a full collection looks at every module that is imported
        for name, function in functions.items():
            taken = seconds_of(function, device, calls[name])
            if run >= warm_up:
                seconds[name].append(taken)
            elif device.startswith("cuda"):
                calls[name] = max(1, round(_SAMPLE / taken))
    return {name: Timing(statistics.median(all_), min(all_), all_) for name, all_ in seconds.items()}


def seconds_of(function: Callable[[], Any], device: str = "cpu", calls: int = 1) -> float:
    """Time a function, in seconds per call.

    On a GPU several calls in a row let the launches of one run while another computes, as they do in training.
    """
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    for _ in range(calls):
        function()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3 / calls


def machine(device: str = "cpu") -> str:
    """Describe what is measured on, for the results."""
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cores
    return f"{platform.machine()}, {name}, torch {torch.__version__}, {device}"


def peak_allocated(function: Callable[[], Any], device: str) -> int | None:
    """Return the most memory that a GPU holds during a function, in bytes, with what it held before; None on a CPU."""
    if not device.startswith("cuda"):
        function()
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int | None:
    """Return the peak memory of a function in bytes, above what the process or GPU held before.

    Returns:
        None where it cannot be measured: on a CPU that takes Linux.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    _trim()  # freed memory that the process keeps would hide the peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        held = _status("VmRSS")
    except OSError:
        function()
        return None
    function()
    return _status("VmHWM") - held


def touch_memory(size: int) -> None:
    """Touch and free so many bytes, so that a virtual machine has the memory when it is measured.

    Its host provides a page at the first touch, which can take longer than filling it. The process's own cost of new
    memory is still measured.
    """
    blocks = [torch.ones(1 << 22) for _ in range(0, size, 1 << 24)]
    del blocks
    _trim()


class _Held:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a node that held its own output would never be freed


def bytes_for_backward(function: Callable[[], Any], existing: Iterable[Tensor] = ()) -> int:
    """Return the bytes that autograd keeps of a forward, except those of existing tensors; each storage counts once."""
    there = {tensor.untyped_storage().data_ptr() for tensor in existing}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def hold(tensor: Tensor) -> _Held:
        kept = _Held(tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda kept: kept.tensor):
        output = function()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage() for kept in held}
    del output
    return sum(storage.nbytes() for address, storage in storages.items() if address not in there)


def flops(function: Callable[[], Any]) -> int:
    """Count the floating-point operations of a function: two per multiply-add of its matrix products."""
    # The counter does not see the fused attention of CPUs.
    own = {torch.ops.aten.addmm_: _added_in_place}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=own) as counter:
        function()
    return counter.get_total_flops()


def _added_in_place(_: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Count `addmm_`, which the counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def _trim() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024
