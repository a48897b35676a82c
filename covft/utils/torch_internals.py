"""Every private name of torch that covft needs, and self-checks that they still mean what they meant.

**Checkpoints.** `torch.utils.checkpoint` keeps a `_CheckpointFrame` per checkpointed region, and pushes a pair of
saved-tensor hooks that holds it, both when the region first runs and when it is recomputed.

**Transforms.** No public function tells whether a transform of torch.func or a forward-mode derivative is running.

**Hooks and names.** Hooks can be counted and found by their owner only in the tables of a module, and wrappers of torch
add a part to the names of parameters.

Each is checked at its first use, and all of them before the first ViT is wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import checkpoint as torch_checkpoint

from covft.errors import UnsupportedVersionError

# The module that a wrapper of torch holds: of torch.compile, and of `checkpoint_wrapper` (which state dicts leave out).
COMPILED, CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
_BEFORE = "_forward_pre_hooks"
_TABLES = (_BEFORE, "_forward_hooks")
_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


def graph_task() -> int:
    """Return the id of the backward pass that the caller runs in, or -1 outside of any."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Return whether the caller runs during a backward pass, as a recomputation does."""
    return graph_task() != -1


def checkpoint_frames() -> list[Any]:
    """Return the frames of the non-reentrant checkpoints around the caller, innermost first.

    Only the top of torch's stack of hooks can be read, so the stack is taken down and put back; nothing runs in
    between.
    """
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    hooks: list[tuple] = []
    frames: list[Any] = []
    if not autograd._saved_tensors_hooks_is_enabled():
        return frames  # then no checkpoint is around the caller, and nothing could be put back
    try:
        while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
            hooks.append(top)
            autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
    for pack, _ in hooks:
        for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
            value = cell.cell_contents
            value = value() if isinstance(value, weakref.ref) else value
            if isinstance(value, torch_checkpoint._CheckpointFrame):
                frames.append(value)
    return frames


def inside_autograd_function() -> bool:
    """Return whether the caller runs inside the forward of a `torch.autograd.Function`.

    Reentrant checkpointing runs the region that it will repeat there, with gradients switched off.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            if isinstance(frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_transformed() -> bool:
    """Return whether a transform of torch.func, or a forward-mode derivative, is running.

    Raises:
        UnsupportedVersionError: If this release of torch does not show it.
    """
    check_transforms()
    return _is_transformed()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks watch the forward or backward of a module itself."""
    return bool(  # asked of every expert in every call, so without a loop
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def remove_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Remove forward hooks that are methods of certain objects.

    Args:
        module: Where they are registered.
        is_ours: Whether an object is one of those.
    """
    for table in _TABLES:
        hooks = getattr(module, table)
        for key in [key for key, hook in hooks.items() if is_ours(getattr(hook, "__self__", None))]:
            for options in (hooks, *(getattr(module, name) for name in _OPTIONS)):
                options.pop(key, None)


def is_hooked_by(module: nn.Module, owner: object) -> bool:
    """Return whether a method of an object runs before the forward of a module."""
    return any(getattr(hook, "__self__", None) is owner for hook in getattr(module, _BEFORE).values())


def remove_state_dict_hooks(module: nn.Module, kind: type) -> None:
    """Remove the hooks of a class that run after the state dict of a module was collected."""
    hooks = module._state_dict_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[key]


def without_checkpointing(name: str) -> str:
    """Return the name that a parameter has in state dicts: without what `checkpoint_wrapper` adds."""
    return name.replace(f"{CHECKPOINTED}.", "")


@functools.cache
def check_torch() -> None:
    """Refuse a torch that does not show what a wrapped ViT needs, rather than lose texts in backward.

    A tiny checkpointed region is run and recomputed; the same frame has to be seen both times. Hooks are registered and
    have to be found, and each kind of transform has to be seen.

    Raises:
        UnsupportedVersionError: If this release of torch keeps any of these otherwise.
    """
    _check_frames()
    _check_hooks()
    check_transforms()


def _check_frames() -> None:
    problem = "Activation checkpointing of this torch does not show which forward a recomputation belongs to."
    seen: list[tuple[bool, list[Any]]] = []

    def region(x: torch.Tensor) -> torch.Tensor:
        seen.append((in_backward(), checkpoint_frames()))
        return x.sin()

    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            x = torch.ones(1, requires_grad=True)
            torch_checkpoint.checkpoint(region, x, use_reentrant=False).backward()  # type: ignore[union-attr]
    except (AttributeError, TypeError) as error:
        raise _unsupported(problem, f"{type(error).__name__}: {error}") from error
    found = [(backward, len(frames)) for backward, frames in seen]
    if found != [(False, 1), (True, 1)] or seen[0][1][0] is not seen[1][1][0]:
        raise _unsupported(problem, f"frames {found}, where one was expected in forward and the same in backward")


class _Owner:
    """Has a hook that does nothing."""

    def __call__(self, *_: Any) -> None: ...


def _check_hooks() -> None:
    """Check that a hook is found in its table while it is registered, and not after it was removed."""
    problem = "Modules of this torch do not show their hooks, so changes of a ViT could not be undone."
    owner, unwatched = _Owner(), nn.Module()
    kinds: dict[str, Callable[[nn.Module], Any]] = {
        "forward pre-hook": lambda module: module.register_forward_pre_hook(owner.__call__, with_kwargs=True),
        "forward hook": lambda module: module.register_forward_hook(owner.__call__, always_call=True),
        "backward hook": lambda module: module.register_full_backward_hook(owner.__call__),
        "backward pre-hook": lambda module: module.register_full_backward_pre_hook(owner.__call__),
    }
    try:
        wrong = ["hooks of a module without any"] if has_hooks(unwatched) else []
        for kind, register in kinds.items():
            module = nn.Module()
            handle = register(module)
            wrong += [] if has_hooks(module) else [f"no {kind}"]
            if kind.startswith("forward"):
                wrong += [] if is_hooked_by(module, owner) == ("pre" in kind) else [f"another owner of a {kind}"]
                remove_hooks(module, lambda found: found is owner)
            else:
                handle.remove()
            wrong += [f"a {kind} that was removed"] if has_hooks(module) else []
        module = nn.Module()
        module.register_state_dict_post_hook(owner)
        remove_state_dict_hooks(module, _Owner)
        wrong += ["a hook of state dicts that was removed"] if module._state_dict_hooks else []
    except (AttributeError, TypeError) as error:
        raise _unsupported(problem, f"{type(error).__name__}: {error}") from error
    if wrong:
        raise _unsupported(problem, ", ".join(wrong))


def check_transforms() -> None:
    """Refuse a torch whose transforms are not seen: fused experts would then give them wrong derivatives.

    Raises:
        UnsupportedVersionError: If this release of torch says otherwise whether one is running.
    """
    problem = "This torch does not show whether a transform of torch.func or a forward-mode derivative is running."
    try:
        if not _is_transformed():  # inside of one, the check waits
            _check_transforms(problem)
    except (AttributeError, TypeError) as error:
        raise _unsupported(problem, f"{type(error).__name__}: {error}") from error


@functools.cache
def _check_transforms(problem: str) -> None:
    # In a thread of its own, which has no saved-tensor hooks of the caller: torch.func.grad refuses those.
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(_seen_in_transforms).result()
    if seen != [True, True, True, False]:
        raise _unsupported(problem, f"seen in vmap, grad, a dual level and outside: {seen}")


def _seen_in_transforms() -> list[bool]:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_is_transformed())
        return x.sum()

    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        torch.func.vmap(look)(torch.ones(1, 1))
        torch.func.grad(look)(torch.ones(1))
        with forward_ad.dual_level():
            look(torch.ones(1))
    look(torch.ones(1, device="cpu"))
    return seen


def _unsupported(problem: str, found: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        problem,
        expected="torch 2.8 or later; 2.14 is the newest that was run",
        got=f"torch {torch.__version__}: {found}",
        fix='pip install "torch>=2.8"',
    )


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside what `torch.compile(module)` returned; any other module itself."""
    inner = module._modules.get(COMPILED)
    return module if inner is None else inner


def eagerly() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run as they were written, with the hooks that they have now."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes long
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
