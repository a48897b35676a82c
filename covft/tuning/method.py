"""A tuning method: its options, and the change that it plans for a ViT."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import nn

from covft.adapters.spec import BlockSpec, ViTSpec
from covft.errors import ConfigError
from covft.surgery.checks import resolve_layers
from covft.tuning.change import Change


class Tower(NamedTuple):
    """A ViT that a method plans a change for.

    Attributes:
        vit: The ViT, which a plan does not change.
        spec: What is known of it.
        last: Index of the last block whose output is read.
        hidden: Whether a hidden state is read, so that what comes after the blocks (a final norm, a head) is not.
        text_dim: Width C of the text features; None where there are none.
        connector: What is between the ViT and the language model of a multimodal LLM: modules by their paths there.
            Empty for a ViT alone.
    """

    vit: nn.Module
    spec: ViTSpec
    last: int
    hidden: bool = False
    text_dim: int | None = None
    connector: Mapping[str, nn.Module] = MappingProxyType({})

    @property
    def read(self) -> tuple[BlockSpec, ...]:
        """The blocks up to the last one that is read, one entry per FFN."""
        return self.spec.blocks[: self.last + 1]

    @property
    def unread(self) -> tuple[str, ...]:
        """Prefixes of the names of parameters that the features do not depend on."""
        read = {block.path for block in self.read}
        later = [block.path for block in self.spec.blocks[self.last + 1 :] if block.path not in read]
        if self.hidden:
            blocks = tuple(block.path for block in self.spec.blocks)
            inside = [path for path, _ in self.vit.named_modules() if path.startswith(blocks)]
            order = [path for path, _ in self.vit.named_modules()]
            after = order[order.index(inside[-1]) + 1 :]
            later += [path for path in after if not inside[-1].startswith(f"{path}.")]
        return tuple(f"{path}." for path in dict.fromkeys(later))

    def layers(self, layers: Iterable[int] | None, default: Iterable[int]) -> tuple[int, ...]:
        """Return block indices that were asked for, ascending and not negative.

        Args:
            layers: As the caller gave them; None takes the default.
            default: Indices of blocks.

        Raises:
            LayerIndexError: If the ViT does not have such blocks, or nothing reads them.
        """
        if layers is None:
            return tuple(layer for layer in default if layer <= self.last) or (self.last,)
        return resolve_layers(tuple(layers), self.spec, self.last)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to tune a vision tower. The fields of a subclass are its options.

    A subclass is a frozen dataclass with a `name` and `plan`. Register one with `covft.tuning.register_method`, or by
    an entry point of the group `covft.tuning`.

    Attributes:
        name: Its id, such as `"lora"`.
        needs_text: Whether a call without text is an error.
        reads_states: Whether it reads states of the text's tokens, shape `(S, L, C)`, instead of features `(S, C)`.
        size: The option that sets how much is trained, for `covft.match`; None if there is none.
        merges: Whether what is trained can be folded into the ViT's own weights, exactly.
        part: Part of a multimodal LLM that new modules belong to: `"projector"`, or `"other"` for the tower.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class ClassToken(Method):
        ...     name = "class_token"
        ...
        ...     def plan(self, tower):
        ...         return Change(trained=("cls_token",))
    """

    name: ClassVar[str]
    needs_text: ClassVar[bool] = False
    reads_states: ClassVar[bool] = False
    size: ClassVar[str | None] = None
    merges: ClassVar[bool] = False
    part: ClassVar[str] = "other"

    @abstractmethod
    def plan(self, tower: Tower) -> Change:
        """Check that the method can be used on a ViT, and say what changes; the ViT is not changed.

        Args:
            tower: The ViT, and what is known of it.

        Raises:
            CoVFTError: If it cannot be used.
        """

    def initialise(self, tower: Tower, change: Change, images: Any) -> None:
        """Give new modules values that depend on the user's images; for most methods, nothing is to be done.

        `covft.tune` calls it before the ViT is changed, `covft.load` does not.

        Args:
            tower: The ViT that the change was planned for.
            change: The plan, whose modules are not in the ViT yet.
            images: What was given to `covft.tune`; None if nothing was.

        Raises:
            CoVFTError: If images are missing, or cannot be used.
        """
        return

    def fold(self, vit: nn.Module, change: Change) -> None:
        """Fold new modules into the ViT's own weights, if the method `merges`.

        Args:
            vit: The changed ViT.
            change: What the method changed.
        """
        return

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def of(cls, options: dict[str, Any]) -> Method:
        """Make a method of its options.

        Args:
            options: The options by name, as keywords or from JSON.

        Raises:
            ConfigError: If an option is not known, or has a value that cannot work.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"{cls.name!r} has no option {', '.join(unknown)}.",
                expected=", ".join(known) or "no options",
                got=", ".join(unknown),
            )
        given = {name: tuple(value) if isinstance(value, list | range) else value for name, value in options.items()}
        return cls(**given)


def check_choice(name: str, value: str, *choices: str) -> None:
    """Refuse a word that is not one of the choices.

    Args:
        name: The option.
        value: Its value.
        *choices: What it may be.

    Raises:
        ConfigError: If it is another.
    """
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r} is not known.",
            expected=" | ".join(choices),
            got=repr(value),
            fix=f"{name}={choices[0]!r}",
        )
