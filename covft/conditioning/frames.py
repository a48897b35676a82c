"""Every private name of torch that conditioning needs, and a self-check that they still mean what they meant.

`torch.utils.checkpoint` keeps a `_CheckpointFrame` per checkpointed region, and pushes a pair of saved-tensor hooks
that holds it, both when the region first runs and when it is recomputed.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from covft.errors import UnsupportedVersionError


def graph_task() -> int:
    """Return the id of the backward pass that the caller runs in, or -1 outside of any."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Return whether the caller runs during a backward pass, as a recomputation does."""
    return graph_task() != -1


def checkpoint_frames() -> list[Any]:
    """Return the frames of the non-reentrant checkpoints around the caller, innermost first.

    Only the top of torch's stack of hooks can be read, so the stack is taken down and put back; nothing runs in
    between.
    """
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    hooks: list[tuple] = []
    frames: list[Any] = []
    if not autograd._saved_tensors_hooks_is_enabled():
        return frames  # then no checkpoint is around the caller, and nothing could be put back
    try:
        while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
            hooks.append(top)
            autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
    for pack, _ in hooks:
        for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
            value = cell.cell_contents
            value = value() if isinstance(value, weakref.ref) else value
            if isinstance(value, torch_checkpoint._CheckpointFrame):
                frames.append(value)
    return frames


def inside_autograd_function() -> bool:
    """Return whether the caller runs inside the forward of a `torch.autograd.Function`.

    Reentrant checkpointing runs the region that it will repeat there, with gradients switched off.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            if isinstance(frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.cache
def check_torch() -> None:
    """Refuse a torch whose checkpoints do not show their frames, rather than lose texts in backward.

    A tiny checkpointed region is run and recomputed; the same frame has to be seen both times.

    Raises:
        UnsupportedVersionError: If this release of torch keeps frames otherwise.
    """
    seen: list[tuple[bool, list[Any]]] = []

    def region(x: torch.Tensor) -> torch.Tensor:
        seen.append((in_backward(), checkpoint_frames()))
        return x.sin()

    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            x = torch.ones(1, requires_grad=True)
            torch_checkpoint.checkpoint(region, x, use_reentrant=False).backward()  # type: ignore[union-attr]
    except (AttributeError, TypeError) as error:
        raise _unsupported(f"{type(error).__name__}: {error}") from error
    found = [(backward, len(frames)) for backward, frames in seen]
    if found != [(False, 1), (True, 1)] or seen[0][1][0] is not seen[1][1][0]:
        raise _unsupported(f"frames {found}, where one was expected in forward and the same in backward")


def _unsupported(found: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        "Activation checkpointing of this torch does not show which forward a recomputation belongs to.",
        expected="torch 2.8 or later; 2.14 is the newest that was run",
        got=f"torch {torch.__version__}: {found}",
        fix='pip install "torch>=2.8"',
    )
