"""An object that replaces one method of a module, on the instance.

It is an object and not a function: a copy or a pickle of the module takes it along, and it then calls the copy's own
method. It has no `__func__`, which accelerate would tear off its owner.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class Override(ABC):
    """Replaces one method of a module.

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
        """Return the arguments of a call by name, those in **kwargs among them."""
        signature = inspect.signature(self.inner)
        values = dict(signature.bind_partial(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                values.update(values.pop(parameter.name, {}))
        return values

    @property
    def is_installed(self) -> bool:
        """Whether the owner's method is this; no longer so if another library has replaced it."""
        found = self.owner.__dict__.get(self.name)
        return getattr(found, "__func__", found) is self

    def install(self) -> None:
        """Put this on the owner."""
        self.owner.__dict__[self.name] = self

    def remove(self) -> None:
        """Put back what was there before."""
        del self.owner.__dict__[self.name]
        if self.replaced is not None:
            self.owner.__dict__[self.name] = self.replaced
