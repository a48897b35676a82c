"""Records which trained parameters get a gradient."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn


class GradientWatch:
    """Records which of some named parameters get a gradient, until it is closed; frozen ones are left out."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._reached: set[str] = set()
        self._hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, name))
            for name, parameter in self.trained.items()
        ]

    def missing(self) -> list[str]:
        """Return the names of the parameters without a gradient so far."""
        # FSDP sets gradients without calling the parameters' hooks.
        return [name for name, p in self.trained.items() if name not in self._reached and p.grad is None]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _note(self, name: str, parameter: nn.Parameter) -> None:
        self._reached.add(name)
