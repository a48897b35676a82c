"""Measures during training how far the updates of a tower agree in direction."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from covft.errors import ConfigError
from covft.utils.sharding import is_sharded
from covft.utils.sketch import GradientSketch, along_first_direction

KEPT = 256  # updates: 2 MB
_FEWEST = 8


class UpdateMonitor:
    """Keeps projected gradients of some steps; compares them with their dominant direction (the paper's Fig. 5).

    It holds the last 256 projections, 2 MB, and two bytes per trained weight for the projection.

    Args:
        named: Trained weights by name, whose gradients are whole on this process.
        every: Steps from one gradient that is kept to the next.

    Raises:
        ConfigError: If weights are sharded.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], every: int) -> None:
        self.every = every
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        sharded = [name for name, parameter in self._parameters.items() if is_sharded(parameter)]
        if sharded:
            raise _whole_gradients_needed(f"{sharded[0]} is sharded")
        self._sketch = GradientSketch()
        self._rows: list[np.ndarray] = []

    @torch.no_grad()
    def note(self, step: int) -> None:
        """Keep the gradients of a step, if its turn has come; gradients that are not finite are left out.

        Args:
            step: Number of finished steps.
        """
        if step % self.every:
            return
        found = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        row = self._sketch(found).numpy()
        if np.isfinite(row).all() and row.any():
            self._rows = [*self._rows[-KEPT + 1 :], row]

    def cosines(self) -> np.ndarray:
        """Return the cosine of each kept gradient with their first principal direction."""
        return along_first_direction(np.stack(self._rows))[0]

    def figures(self) -> dict[str, float]:
        """Return mean and deviation of the cosines, and of how many gradients; nothing of fewer than eight.

        The direction is fitted to the same gradients: N of them without a common direction have cosines with a root
        mean square of N ** -0.5.
        """
        if len(self._rows) < _FEWEST:
            return {}
        cosines = self.cosines()
        return {
            "covft/update_cosine": float(cosines.mean()),
            "covft/update_cosine_std": float(cosines.std(ddof=1)),
            "covft/updates": float(len(cosines)),
        }


def check_engine() -> None:
    """Refuse engines that shard gradients.

    Raises:
        ConfigError: If the trainer uses DeepSpeed or FSDP.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    engine = AcceleratorState().distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise _whole_gradients_needed(f"{engine.name}")


def _whole_gradients_needed(got: str) -> ConfigError:
    return ConfigError(
        "conflict_every needs whole gradients, and these are sharded.",
        expected="one process, or DDP",
        got=got,
        fix="CoVFTCallback(..., conflict_every=None)",
    )
