"""A callable that stands for a method of a model, on the instance.

It is an object and not a function: a copy or a pickle of the model takes it along, and it then calls the copy's own
method. It has no `__func__`, which accelerate would tear off its owner.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any

from torch import nn

from covft.errors import CheckpointError


class Method(ABC):
    """Stands for one method of a model.

    Args:
        owner: The module whose method it is.
        name: The method.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner, self.name = owner, name
        self.replaced = owner.__dict__.get(name)  # by another library, on the instance

    @property
    def owner(self) -> Any:
        """The module whose method it is."""
        return self._owner

    @property
    def inner(self) -> Any:
        """The owner's own method."""
        if self.replaced is not None:
            return self.replaced
        return getattr(type(self.owner), self.name).__get__(self.owner)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the owner's own method, prepared."""

    def _own(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # accelerate's unwrapping binds what it finds at `forward` to the model.
        return args[1:] if args and args[0] is self.owner else args

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, those in **kwargs among them."""
        signature = inspect.signature(self.inner)
        values = dict(signature.bind_partial(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                values.update(values.pop(parameter.name, {}))
        return values

    def stand_in(self) -> None:
        """Put this on the owner."""
        self.owner.__dict__[self.name] = self

    def step_back(self) -> None:
        """Take this away again."""
        del self.owner.__dict__[self.name]
        if self.replaced is not None:
            self.owner.__dict__[self.name] = self.replaced


def running_save() -> FrameType | None:
    """The frame of transformers' `save_pretrained` that the caller runs in; None if it runs in none."""
    frame = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_code.co_name == "save_pretrained"
            and frame.f_globals.get("__name__") == "transformers.modeling_utils"
        ):
            return frame
        frame = frame.f_back
    return None


def refuse_runtime_names(slot: nn.Module) -> None:
    """Refuse that transformers writes the names of an adapted FFN into a file.

    `from_pretrained` would find no FFN there, and start one anew.

    Args:
        slot: The adapted FFN.

    Raises:
        CheckpointError: If such a file is about to be written.
    """
    frame = running_save()
    state = None if frame is None else frame.f_locals.get("state_dict")
    if not state:
        return
    model = frame.f_locals["self"]  # type: ignore[union-attr]
    path = next((name for name, module in model.named_modules() if module is slot), None)
    found = [] if path is None else [name for name in state if name.startswith(f"{path}.experts.")]
    if found:
        raise CheckpointError(
            f"{type(model).__name__} holds a context-aware ViT, and this state dict has names that from_pretrained "
            "does not know: it would start those FFNs anew.",
            expected="model.save_pretrained(folder) without state_dict=, which writes the original FFNs",
            got=f"{len(found)} names such as {found[0]}",
            fix="covft.attach(model, ...) instead of covft.wrap(tower, ...), which takes state dicts; or "
            "encoder.save_pretrained(folder) for the ViT",
        )
