"""Which trained parameters backward has reached."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn


class GradientWatch:
    """Notes which parameters get a gradient, until it is closed.

    Args:
        named: Parameters by name; those that are not trained are left out.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._reached: set[str] = set()
        self._hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, name))
            for name, parameter in self.trained.items()
        ]

    def missing(self) -> list[str]:
        """Names of the parameters that got none so far."""
        # FSDP hands gradients over without the parameters' own hooks.
        return [name for name, p in self.trained.items() if name not in self._reached and p.grad is None]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _note(self, name: str, parameter: nn.Parameter) -> None:
        self._reached.add(name)
