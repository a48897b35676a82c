"""The strength of what was trained: the ViT's own FFNs and norms run beside it, and their outputs are mixed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import UnsupportedViTError
from covft.nn.functional import in_type_of
from covft.surgery.attention import Update
from covft.surgery.checks import check_restorable
from covft.surgery.ffns import first_expert, follow, follows
from covft.surgery.split import SplitFFN
from covft.surgery.wrapped import WrappedViT, module_at
from covft.utils.modes import freeze_batch_norms
from covft.utils.peft import is_adapter
from covft.utils.torch_internals import remove_hooks


class Dial:
    """Mixes the outputs of trained modules with those of the originals, for a strength below 1.

    Nothing of it is in a state dict, and no weight changes: trained weights are saved and trained as ever. Its method
    is a forward pre-hook of the ViT.

    Args:
        wrapped: The wrapped ViT.
        strength: From 0 to 1.

    Raises:
        UnsupportedViTError: If the originals are not known, or other code has replaced what `wrap` put there.
    """

    def __init__(self, wrapped: WrappedViT, strength: float) -> None:
        wrapped.check_in_place("A strength below 1")
        check_restorable(wrapped.vit, wrapped.original)
        self.wrapped, self.strength = wrapped, strength
        self.norms = {path: Beside(self, _as_it_was(norm, values)) for path, norm, values in _norms(wrapped)}
        self.ffns = {layer: Beside(self, _original_ffn(wrapped, layer)) for layer in wrapped.slots()}

    def install(self) -> None:
        """Let the originals run."""
        vit = self.wrapped.vit
        for layer, slot in self.wrapped.slots().items():
            slot.beside = self.ffns[layer]
        for path, beside in self.norms.items():
            vit.get_submodule(path).register_forward_hook(beside.after, with_kwargs=True)
        vit.register_forward_pre_hook(self.follow)
        self.follow(vit, ())

    def remove(self) -> None:
        """Undo `install`."""
        for slot in self.wrapped.slots().values():
            slot.beside = None
        for module in self.wrapped.vit.modules():
            remove_hooks(module, lambda owner: isinstance(owner, Beside | Dial))

    def follow(self, vit: nn.Module, args: Any) -> None:
        """Put the originals where the trained modules are by now, in their type and mode."""
        if torch.compiler.is_compiling():
            return
        narrow = self.wrapped.original.type_in(vit)
        for layer, slot in self.wrapped.slots().items():
            self.ffns[layer].place(first_expert(slot, whole=True), narrow, training=slot.training)
        for path, beside in self.norms.items():
            norm = module_at(vit, path)
            if norm is not None:
                beside.place(norm, narrow, training=norm.training)


class Beside:
    """An original module that runs beside what was trained in its place.

    Args:
        dial: Has the strength.
        original: The module as it was; never changed.
    """

    def __init__(self, dial: Dial, original: nn.Module) -> None:
        self.dial, self.original = dial, original
        self.module = original

    @property
    def needs_trained(self) -> bool:
        """Whether the trained module has to run: at 0 only for its gradients of zeros, which DDP waits for."""
        return self.dial.strength > 0 or torch.is_grad_enabled()

    def place(self, like: nn.Module, dtype: torch.dtype | None, *, training: bool) -> None:
        """Move to the device and type of another module, in a copy.

        Args:
            like: The module.
            dtype: Type of floating-point tensors; None takes those of `like`.
            training: Whether it is in training mode.
        """
        if not follows(self.module, like, dtype):
            with torch.inference_mode(False), torch.no_grad():
                self.module = copy.deepcopy(self.original)
                follow(self.module, like, dtype)
        if self.module.training != training:
            self.module.train(training)
        freeze_batch_norms(self.module)

    def mix(self, trained: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mixture of the two outputs.

        Args:
            trained: Output of the trained module; None where it need not run.
            x: Input of both.
            *args: Passed to the original.
            **kwargs: Passed to the original.
        """
        tokens = in_type_of(x, next(self.module.parameters(), None))
        start = self.module(tokens, *args, **kwargs)
        start = start if tokens is x else start.to(x.dtype)
        if trained is None:
            return start
        trained, strength = trained.to(start.dtype), self.dial.strength
        if strength == 0:  # whatever is trained, infinite values too, has no part in it
            return torch.where(torch.zeros((), dtype=torch.bool, device=start.device), trained, start)
        return start * (1 - strength) + trained * strength

    def after(self, norm: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Mix the output of a norm; a forward hook."""
        return self.mix(output, *args, **kwargs)


def set_strength(wrapped: WrappedViT, dial: Dial | None, strength: float) -> Dial | None:
    """Set the strength of a wrapped ViT.

    Args:
        wrapped: The wrapped ViT.
        dial: Its dial; None at strength 1.
        strength: From 0 to 1.

    Returns:
        Its dial from now on.
    """
    for module in wrapped.vit.modules():
        if isinstance(module, Update):
            module.strength = strength
    if strength == 1:
        if dial is not None:
            dial.remove()
        return None
    if dial is None:
        dial = Dial(wrapped, strength)
        dial.install()
    dial.strength = strength
    return dial


def _original_ffn(wrapped: WrappedViT, layer: int) -> nn.Module:
    block, ffns = wrapped.spec.blocks[layer], wrapped.original.ffns
    if block.output_path is None:
        return ffns[block.mlp_path]
    return SplitFFN(ffns[block.mlp_path], ffns[block.output_path], adds_residual=block.adds_residual)


def _norms(wrapped: WrappedViT) -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Return the trained norms: path, module, and original values by name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in wrapped.norms:
        path, _, own = name.rpartition(".")
        found.setdefault(path, {})[own] = wrapped.original.values[name]
    norms = [(path, module_at(wrapped.vit, path), values) for path, values in found.items()]
    adapters = [path for path, norm, _ in norms if norm is not None and is_adapter(norm)]
    if adapters:
        raise UnsupportedViTError(
            "peft has put adapters around norms that covft trains, so a strength has no meaning for them.",
            expected="norms as wrap() left them",
            got=", ".join(adapters[:5]),
            fix="encoder.strength = 1",
        )
    return [(path, norm, values) for path, norm, values in norms if norm is not None]


def _as_it_was(norm: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Return a module like a norm with its original values, without hooks and overrides."""
    twin = type(norm).__new__(type(norm))
    nn.Module.__init__(twin)
    own = {name: value for name, value in norm.__dict__.items() if name not in twin.__dict__ and name != "forward"}
    twin.__dict__.update(own)
    for name, parameter in norm._parameters.items():
        value = values.get(name, parameter)
        twin.register_parameter(name, None if value is None else nn.Parameter(value.detach(), requires_grad=False))
    twin._buffers.update(norm._buffers)
    twin._modules.update(norm._modules)
    return twin.train(norm.training)
