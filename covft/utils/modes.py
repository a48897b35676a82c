"""Runs a module in eval mode, and gives each module its own mode back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """While open, a module is in eval mode; afterwards each module in it has the mode that it had.

    Args:
        module: The module.
    """
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, training in modes.items():
            part.training = training
