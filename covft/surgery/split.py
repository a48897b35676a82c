"""FFNs that a block calls in two halves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SplitFFN(nn.Module):
    """The two halves of an FFN as one module.

    A second half that adds the block's residual is given zeros instead: experts mix what the FFN computes, and
    `SecondHalf` adds the residual once.

    Args:
        intermediate: The half that widens; taken as it is.
        output: The half that narrows, called as `output(h)` or `output(h, residual)`; taken as it is.
        adds_residual: Whether the second half takes the residual, and adds it.

    Example:
        >>> SplitFFN(nn.Linear(4, 8), nn.Linear(8, 4))(torch.rand(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, intermediate: nn.Module, output: nn.Module, *, adds_residual: bool = False) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.output = output
        self.adds_residual = adds_residual
        self.train(intermediate.training)

    def forward(self, x: Tensor) -> Tensor:
        """Run both halves, without the residual; tokens in and out."""
        h = self.intermediate(x)
        return self.output(h, h.new_zeros(())) if self.adds_residual else self.output(h)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            first = self.__dict__.get("_modules", {}).get("intermediate")
            if first is None or name.startswith("_"):
                raise
            return getattr(first, name)  # for code that reads `intermediate.dense`


class SecondHalf(nn.Module):
    """Replaces the second half of an FFN where the slot of the first half computes both.

    It adds the residual if it is given one, and does nothing else. Attributes that foreign code reads off the second
    half are those of the first expert's.

    Args:
        slot: The adapted FFN in the place of the first half; not a child of this module.
    """

    def __init__(self, slot: nn.Module) -> None:
        super().__init__()
        self.__dict__["slot"] = slot
        self.training = slot.training

    def forward(self, mixed: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return what the FFN computed, plus the residual if there is one."""
        return mixed if residual is None else mixed + residual

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            slot = self.__dict__.get("slot")
            if slot is None or name.startswith("_"):
                raise
            return getattr(slot.experts.prototype.output, name)
