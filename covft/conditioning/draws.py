"""Random draws that a recomputation repeats, whatever the state of the random generators is by then."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from covft.utils.torch_internals import checkpoint_frames, graph_task


class Draws:
    """Seeds, noted for the checkpoint frames around each draw.

    A recomputation of a frame draws as often and in the same order as its forward did, so the n-th draw in it gets the
    n-th seed that was noted.
    """

    def __init__(self) -> None:
        self._of_frame: weakref.WeakKeyDictionary[Any, _Noted] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def next(self) -> int:
        """Draw a seed, or repeat that of the forward in a recomputation."""
        # torch's own generator moves on in a recomputation as well, as it did in the forward.
        seed = int(torch.randint(2**31, ()).item())
        if torch.compiler.is_compiling():
            return seed
        frames, task = checkpoint_frames(), graph_task()
        if not frames:
            return seed
        with self._lock:
            noted = [self._of_frame.setdefault(frame, _Noted(task)) for frame in frames]
            again = [seeds.repeat(task) for seeds in noted if seeds.task != task]
            seed = next((one for one in again if one is not None), seed)
            for seeds in noted:
                if seeds.task == task:
                    seeds.seeds.append(seed)
        return seed


class _Noted:
    """The seeds that were drawn in one frame.

    Args:
        task: The backward pass that its first run was part of; -1 for none.
    """

    def __init__(self, task: int) -> None:
        self.task = task
        self.seeds: list[int] = []
        self._repeated: dict[int, int] = {}  # by backward pass, since a graph may be kept for several

    def repeat(self, task: int) -> int | None:
        """Return the next seed for a recomputation; None if the forward drew no more."""
        number = self._repeated.get(task, 0)
        self._repeated[task] = number + 1
        return self.seeds[number] if number < len(self.seeds) else None
