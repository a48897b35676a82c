"""What a method does to a ViT, as data: planned without touching it, then applied, then undone bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from covft.conditioning import Conditioning
from covft.errors import UnsupportedViTError
from covft.surgery.checks import MARK, check_not_distributed
from covft.surgery.overrides import Override
from covft.surgery.precision import narrow_weights
from covft.surgery.wrapped import module_at
from covft.utils.modes import freeze_batch_norms
from covft.utils.sharding import assign, full, in_engine
from covft.utils.torch_internals import remove_hooks


class Hook(NamedTuple):
    """A forward hook.

    Attributes:
        path: Dotted path of the hooked module in the ViT; empty for the ViT itself.
        call: A method of an added module, so that copies of the ViT take it along.
        before: Whether it runs before the module (with keywords) or after it.
    """

    path: str
    call: Callable[..., Any]
    before: bool = False


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a method changes in a ViT; everything else of the ViT is frozen.

    Attributes:
        trained: Names of the ViT's own parameters that are trained.
        added: New modules, by the dotted paths that they get in the ViT.
        replaced: Modules that replace others, by path. Each holds the module that it replaces.
        hooks: Forward hooks.
        overrides: What stands in for methods of modules, which may be outside the ViT. The weights of these modules are
            frozen: the method's own modules, which are in the ViT, run in their place.
        conditioning: Carries the text to the new modules; None for a method without text.
    """

    trained: tuple[str, ...] = ()
    added: Mapping[str, nn.Module] = field(default_factory=dict)
    replaced: Mapping[str, nn.Module] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()
    overrides: tuple[Override, ...] = ()
    conditioning: Conditioning | None = None

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is added to the ViT, by its name there."""
        held = {id(p) for module in self.replaced.values() for p in _held_by(module).parameters()}
        for path, module in (*self.added.items(), *self.replaced.items()):
            yield from ((f"{path}.{name}", p) for name, p in module.named_parameters() if id(p) not in held)

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of the modules that something else stands in for."""
        for override in self.overrides:
            yield from override.owner.parameters()


@dataclass
class Applied:
    """What stood in the ViT before; not part of any state dict.

    Attributes:
        modules: Modules that were replaced, by path.
        values: Values of the ViT's own parameters that are trained, on the CPU, by their names before.
        requires_grad: Whether each parameter was trainable, by its name before.
        idle: Whether each of `Change.idle_parameters` was trainable.
        narrow: The ViT's own parameters that were cast to float32 since, by name; see `widen_weights`.
        over: Whether the ViT is plain again, after `undo` or `finish`.
    """

    modules: dict[str, nn.Module]
    values: dict[str, Tensor]
    requires_grad: dict[str, bool]
    idle: list[bool] = field(default_factory=list)
    narrow: dict[str, str] = field(default_factory=dict)
    over: bool = False


def apply(vit: nn.Module, change: Change) -> Applied:
    """Change a ViT as planned.

    Args:
        vit: The ViT that the change was planned for.
        change: The plan.

    Returns:
        What `undo` needs.
    """
    own = dict(vit.named_parameters())
    applied = Applied(
        modules={path: vit.get_submodule(path) for path in change.replaced},
        values={name: _copy(own[name]) for name in change.trained},
        requires_grad={name: parameter.requires_grad for name, parameter in own.items()},
        idle=[parameter.requires_grad for parameter in change.idle_parameters()],
    )
    for parameter in change.idle_parameters():
        parameter.requires_grad_(False)
    for override in change.overrides:
        override.install()
    for name, parameter in own.items():
        parameter.requires_grad_(name in applied.values)
    for path, module in change.replaced.items():
        vit.set_submodule(path, module)
    for path, module in change.added.items():
        parent, _, name = path.rpartition(".")
        vit.get_submodule(parent).add_module(name, module)
    for module in (*change.added.values(), *change.replaced.values()):
        held = set(_held_by(module).modules())
        for part in module.modules():
            # transformers initialises modules without this mark again when the model around them is.
            if part not in held:
                part._is_hf_initialized = True  # type: ignore[assignment]
    for hook in change.hooks:
        place = vit.get_submodule(hook.path)
        if hook.before:
            place.register_forward_pre_hook(hook.call, with_kwargs=True)
        else:
            # First: hooks that were there before, such as those that collect hidden states, see what the block returns.
            place.register_forward_hook(hook.call, with_kwargs=True, prepend=True)
    if change.conditioning is not None:
        vit.register_forward_pre_hook(change.conditioning.enter_tower, with_kwargs=True, prepend=True)
        vit.register_forward_hook(change.conditioning.leave_tower, always_call=True)
    return applied


def undo(vit: nn.Module, change: Change, applied: Applied) -> None:
    """Restore a ViT as it was before `apply`, bit for bit.

    Args:
        vit: The changed ViT.
        change: What was applied to it.
        applied: What `apply` returned.
    """
    for path, module in applied.modules.items():
        vit.set_submodule(path, module)
    narrow_weights(vit, applied.narrow)
    own = dict(vit.named_parameters())
    for name, value in applied.values.items():
        assign(own[name], value)
    finish(vit, change, applied)


def finish(vit: nn.Module, change: Change, applied: Applied) -> None:
    """Leave a ViT with the values that it has, and as it was before `apply` in all else.

    Args:
        vit: The changed ViT, in which the modules that were replaced are back.
        change: What was applied to it.
        applied: What `apply` returned.
    """
    ours = {id(part) for module in change.added.values() for part in module.modules()}
    for path in dict.fromkeys(("", *(hook.path for hook in change.hooks))):
        place = vit.get_submodule(path)
        remove_hooks(place, lambda owner: owner is not None and (id(owner) in ours or owner is change.conditioning))
    for path, module in change.added.items():
        parent, _, name = path.rpartition(".")
        if (place := module_at(vit, parent)) is not None:  # which may be gone with a module that was replaced
            place._modules.pop(name, None)
        if isinstance(module, FrozenBatchNorms):
            module.release(vit)
    narrow_weights(vit, applied.narrow)
    for override in reversed(change.overrides):
        override.remove()
    for parameter, trained in zip(change.idle_parameters(), applied.idle, strict=True):
        parameter.requires_grad_(trained)
    own = dict(vit.named_parameters())
    for name in applied.values:
        own[name].grad = None
    for name, trained in applied.requires_grad.items():
        own[name].requires_grad_(trained)
    vit.__dict__.pop(MARK, None)
    applied.over = True


def check_removable(vit: nn.Module, change: Change, applied: Applied) -> None:
    """Refuse to undo or finish a change that is not there any more, or of a ViT that is distributed.

    Raises:
        UnsupportedViTError: If it is.
    """
    check_not_distributed(vit, in_engine(vit), "build the ViT anew from its source")
    if applied.over:
        raise UnsupportedViTError("This ViT is restored or merged already.", fix='covft.tune(vit, "lora")')
    check_in_place(vit, change)


def check_in_place(vit: nn.Module, change: Change) -> None:
    """Refuse to undo a change in which other code has changed something since.

    Raises:
        UnsupportedViTError: If what was put into the ViT is not where it was put.
    """
    placed = {**change.added, **change.replaced}
    moved = [path for path, module in placed.items() if module_at(vit, path) is not module]
    moved += [type(override.owner).__name__ for override in change.overrides if not override.is_installed]
    if moved:
        raise UnsupportedViTError(
            "Other code has replaced or removed what the method put into the ViT.",
            expected="the ViT as covft.tune left it, apart from values",
            got=", ".join(moved[:5]),
            fix="undo what the other library did first",
        )


def _copy(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, on the CPU; nothing is there to copy on the meta device."""
    value = full(parameter).detach()
    return value.clone() if value.is_meta else value.to("cpu", copy=True)


def _held_by(module: nn.Module) -> nn.Module:
    """Return the module that a replacement holds."""
    for name in ("base_layer", "inner"):
        held = getattr(module, name, None)
        if isinstance(held, nn.Module):
            return held
    return nn.Module()


class FrozenBatchNorms(nn.Module):
    """Keeps the statistics of a tower's batch norms, which nothing would save or undo; a hook of the ViT."""

    def keep(self, vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Put batch norms into eval mode."""
        if vit.training:
            freeze_batch_norms(vit)

    def release(self, vit: nn.Module) -> None:
        """Put them back into the mode of the ViT."""
        for module in vit.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = vit.training
