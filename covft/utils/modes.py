"""Training and eval mode of modules."""

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


def freeze_batch_norms(module: nn.Module) -> None:
    """Keep the statistics of batch norms: they belong to the frozen ViT, as weights do.

    Args:
        module: A ViT or a part of it, in training mode.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            part.training = False
