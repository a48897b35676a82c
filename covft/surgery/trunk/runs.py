"""Runs of a tower that stop at its first adapted block, and runs that start there."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from covft.conditioning import TowerCall
from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.nn.functional import autocasts
from covft.surgery.overrides import Override
from covft.surgery.slot import AdaptedFFN
from covft.surgery.split import SecondHalf
from covft.surgery.trunk.states import NotKept, States, bytes_of, picked_arguments
from covft.surgery.wrapped import WrappedViT
from covft.text.inputs import check_index_has_text
from covft.utils.torch_internals import eagerly

# The run that the calling code is part of: a `_Recording` or a `_Resumption`.
_RUN: ContextVar[Any] = ContextVar("covft_trunk_run", default=None)


@dataclass(frozen=True, eq=False, repr=False)
class Trunk:
    """What a tower computes of images before its first adapted block, for any number of texts.

    `encoder.trunk(images)` makes it, and `encoder(trunk=..., text=...)` goes on from there. `trunk[[0, 0, 1]]` has the
    first image twice, and `len(trunk)` images in all.

    Attributes:
        args: Positional arguments of the tower's call.
        kwargs: Its keyword arguments.
        states: Outputs of the blocks.
        call: What the call tells about its images.
        weights: What identifies the weights and settings that it was computed with.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: States
    call: TowerCall
    weights: tuple[Any, ...]

    def __len__(self) -> int:
        """Number of images."""
        return self.states.count

    def __repr__(self) -> str:
        return f"Trunk(images={len(self)}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it holds."""
        return self.states.nbytes + bytes_of((self.args, self.kwargs))

    def __getitem__(self, index: Sequence[int] | Tensor) -> Trunk:
        """Return the trunk of some images, in the order of the index, which may repeat them.

        Args:
            index: Numbers of images.

        Raises:
            ShapeError: If there are no such images, or it is not known which part of an argument belongs to which.
        """
        chosen = [int(i) for i in index]
        if not chosen or not all(0 <= i < len(self) for i in chosen):
            raise ShapeError(
                "The index asks for images that the trunk does not have.",
                expected=f"numbers from 0 to {len(self) - 1}",
                got=chosen,
            )
        args, kwargs = picked_arguments(self.args, self.kwargs, self.call, chosen)
        states = self.states.picked(chosen)
        call = TowerCall(self.call.format, states.count, None, states.segments)
        return Trunk(args, kwargs, states, call, self.weights)


class Gate:
    """Puts overrides on the blocks of one tower while a run needs them, in any thread.

    Nothing of it stays on the tower after a call. Copies and pickles of it are new.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._overrides: list[_Block] = []

    def __reduce__(self) -> tuple:
        return Gate, ()

    @contextlib.contextmanager
    def running(self, wrapped: WrappedViT, run: Any) -> Iterator[None]:
        """Let a run see the blocks of the tower, in this thread alone.

        Args:
            wrapped: The wrapped ViT.
            run: Decides what a block of the trunk returns, and whether the first adapted block begins.
        """
        with self._lock:
            if not self._users:
                self._overrides = [_Block(wrapped.vit.get_submodule(path), path) for path in _paths(wrapped)]
                for override in self._overrides:
                    override.install()
            self._users += 1
        token = _RUN.set(run)
        try:
            with eagerly():
                yield
        finally:
            _RUN.reset(token)
            with self._lock:
                self._users -= 1
                if not self._users:
                    for override in self._overrides:
                        override.remove()
                    self._overrides = []


def is_running() -> bool:
    """Return whether the caller runs inside a run of the trunk, or one that starts after it."""
    return _RUN.get() is not None


def has_trunk(wrapped: WrappedViT) -> bool:
    """Return whether blocks run before the first adapted one."""
    return not next((adapted for _, adapted in _blocks(wrapped)), True)


def check_trunk(wrapped: WrappedViT) -> None:
    """Refuse a ViT whose first block is adapted.

    Raises:
        ConfigError: If it is.
    """
    if not has_trunk(wrapped):
        raise ConfigError(
            "This encoder has no trunk: the first block that runs is adapted.",
            expected="layers that leave out the first block",
            got=f"layers={list(wrapped.layers)}",
            fix="encoder(images, texts)",
        )


def record(wrapped: WrappedViT, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any], keep: str = "last") -> Trunk:
    """Run the tower up to its first adapted block.

    Args:
        wrapped: The wrapped ViT.
        gate: Of this ViT.
        args: Positional arguments of the tower.
        kwargs: Its keyword arguments.
        keep: `"last"` or `"all"`: of which blocks of the trunk the outputs are kept.

    Raises:
        ConfigError: If the first block that runs is adapted.
        ShapeError: If the call does not tell how many images there are.
        UnsupportedViTError: If the trunk is random in training mode.
    """
    if keep not in ("last", "all"):
        raise ConfigError(f"keep={keep!r} is not known.", expected="'last' or 'all'", got=repr(keep))
    check_trunk(wrapped)
    vit, conditioning = wrapped.vit, wrapped.conditioning
    call = TowerCall.read(conditioning.format, vit, args, kwargs)
    if not call.num_images and call.segments is not None:
        call = TowerCall(call.format, len(call.segments), call.mask_BN, call.segments)
    if not call.num_images:
        raise ShapeError(
            f"How many images this call of {type(vit).__name__} has is not known, so it has no trunk for each.",
            expected="images (B, 3, H, W), or packed images with their sizes",
            got=", ".join([*("a positional argument" for _ in args), *kwargs]) or "no arguments",
        )
    run = _Recording(vit, keep, draws=conditioning.draws_seeds or conditioning.has_null_text)
    # No text reaches an FFN: the run stops before the first block that has one.
    width = wrapped.text_dim
    text = None if width is None else torch.zeros(1, width, device=next(vit.parameters()).device)
    scope = conditioning.enter(text, shared=True)
    try:
        with gate.running(wrapped, run):
            vit(*args, **kwargs)
    except _Reached:
        pass
    finally:
        conditioning.leave(scope)
    return Trunk(args, dict(kwargs), States(tuple(run.outputs), call.num_images, call.segments), call, weights(wrapped))


@contextlib.contextmanager
def resume(wrapped: WrappedViT, gate: Gate, states: States) -> Iterator[None]:
    """While open, let the blocks of the trunk return what they returned for these images.

    Args:
        wrapped: The wrapped ViT.
        gate: Of this ViT.
        states: Their outputs.
    """
    with gate.running(wrapped, _Resumption(states)):
        yield


def resumed(encoder: Any, gate: Gate, trunk: Trunk, given: Sequence[str], text: Any, index: Any) -> Any:
    """Run a tower from where its trunk ends.

    Args:
        encoder: The wrapped ViT, called with text.
        gate: Of this ViT.
        trunk: What was computed of the images.
        given: Names of arguments that were given with it.
        text: As for calling the encoder.
        index: As for calling the encoder.

    Returns:
        What the ViT returns.

    Raises:
        ConfigError: If arguments were given with it, or it was computed with other weights or settings.
    """
    if given:
        raise ConfigError(
            "A trunk holds its images and the arguments of the ViT.",
            expected="encoder(trunk=trunk, text=texts)",
            got=f"trunk= with {', '.join(given)}",
        )
    if trunk.weights != weights(encoder):
        raise ConfigError(
            "Weights of the trunk, the strength or autocast have changed since the trunk was computed.",
            expected="the trunk of the ViT as it is now",
            got="another one",
            fix="encoder(trunk=encoder.trunk(images), text=texts)",
        )
    check_index_has_text(index, text)
    with contextlib.nullcontext() if text is None else encoder.condition(text, index):
        scope = encoder.conditioning.require()
        asked = None if scope is None or len(trunk) != 1 else scope.num_images
        trunk = trunk if asked in (None, 1) else trunk[[0] * asked]
        with resume(encoder, gate, trunk.states):
            return encoder.vit(*trunk.args, **trunk.kwargs)


def weights(wrapped: WrappedViT) -> tuple[Any, ...]:
    """Return what identifies the weights of the trunk and the settings that change what it computes.

    Counted are the parameters and buffers that the ViT has before those of its first adapted block.
    """
    vit = wrapped.vit
    end = next((path for path, adapted in _blocks(wrapped) if adapted), "") + "."
    found: list[Any] = []
    for named in (vit.named_parameters(), vit.named_buffers()):
        for _, tensor in itertools.takewhile(lambda pair: not pair[0].startswith(end), named):
            local = getattr(tensor, "_local_tensor", tensor)
            found.append((local.data_ptr(), -1 if tensor.is_inference() else tensor._version))
    kind = next(vit.parameters()).device.type
    autocast = torch.get_autocast_dtype(kind) if autocasts(kind) else None
    return (getattr(wrapped, "strength", 1.0), autocast, *found)


class _Reached(Exception):
    """Leaves the tower where its first adapted block would begin."""


class _Block(Override):
    """Replaces the forward of a block while a run of the trunk is open in some thread."""

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, "forward")
        self.path, self.adapted = path, _is_adapted(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Let the run of this thread decide; without one, run the block."""
        args, run = self._own(args), _RUN.get()
        if run is None:
            return self.inner(*args, **kwargs)
        return run.block(self, self.inner, args, kwargs)


class _Recording:
    """Notes what the blocks of the trunk return."""

    def __init__(self, vit: nn.Module, keep: str, *, draws: bool) -> None:
        self.outputs: list[tuple[str, Any]] = []
        self._keep, self._draws = keep, draws  # seeds of routing, before the first block
        self._device = next(vit.parameters()).device if vit.training else None
        self._random = self._states()

    def block(self, block: _Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block of the trunk, or stop."""
        if block.adapted:
            self._check_random()
            raise _Reached
        if not self.outputs and self._draws:
            self._random = self._states()
        if self.outputs and self._keep == "last":
            self._drop_if_passed_on(args, kwargs)
        output = inner(*args, **kwargs)
        self.outputs.append((block.path, output))
        return output

    def _drop_if_passed_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Drop the last output if the next block gets it as it is, so that nothing is computed from it in between."""
        path, output = self.outputs[-1]
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        if all(id(leaf) in given for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            self.outputs[-1] = (path, tree_map_only(Tensor, NotKept, output))

    def _states(self) -> list[Tensor]:
        if self._device is None:
            return []
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _check_random(self) -> None:
        if not all(torch.equal(before, now) for before, now in zip(self._random, self._states(), strict=False)):
            raise UnsupportedViTError(
                "The trunk is random in training mode, so one run cannot stand for all.",
                expected="blocks without dropout and stochastic depth before the first adapted one",
                got="random numbers drawn there",
                fix="encoder.eval(), or rates of 0 when the ViT is built",
            )


class _Resumption:
    """Returns what the blocks of the trunk returned, and runs all others."""

    def __init__(self, states: States) -> None:
        self._outputs, self._next = states.outputs, 0

    def block(self, block: _Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the next output of the trunk, or run a block after it."""
        left = self._next < len(self._outputs)
        if left and self._outputs[self._next][0] == block.path:
            output = self._outputs[self._next][1]
            self._next += 1
            # A block may change its input in place.
            return tree_map_only(Tensor, lambda t: t if isinstance(t, NotKept) else t.clone(), output)
        if left:
            raise UnsupportedViTError(
                "Other blocks run now than when the trunk was computed.",
                expected=self._outputs[self._next][0],
                got=block.path,
                fix="encoder.trunk(images), with the ViT as it is now",
            )
        return inner(*args, **kwargs)


def _is_adapted(block: nn.Module) -> bool:
    return any(isinstance(module, AdaptedFFN | SecondHalf) for module in block.modules())


def _paths(wrapped: WrappedViT) -> list[str]:
    return list(dict.fromkeys(block.path for block in wrapped.spec.blocks))


def _blocks(wrapped: WrappedViT) -> Iterator[tuple[str, bool]]:
    """Yield each block's path, and whether it is adapted, in the order in which they run."""
    for path in _paths(wrapped):
        yield path, _is_adapted(wrapped.vit.get_submodule(path))
