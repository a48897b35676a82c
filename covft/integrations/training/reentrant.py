"""Activation checkpointing of trainers: made non-reentrant, or refused with the key of the trainer that runs.

The reentrant kind runs the forward without gradients, so a block of a frozen ViT, whose input needs none, has none for
its experts either. It is the default of LLaMA-Factory, of transformers 4, of ms-swift where it runs no DDP, and of TRL
with LoRA under ZeRO-3.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch.utils.checkpoint
from torch import nn

from covft.errors import ReentrantCheckpointError
from covft.utils.transformers_names import CHECKPOINTING

# How each trainer is told, by the package of the class of its arguments.
_KEYS = {
    "llamafactory": "use_reentrant_gc: false in the YAML file, and use_unsloth_gc left out",
    "swift": """--gradient_checkpointing_kwargs '{"use_reentrant": false}'""",
    "trl": "gradient_checkpointing_kwargs={'use_reentrant': False}; with LoRA under ZeRO-3, where TRL sets it to True, "
    "gradient_checkpointing=False or ZeRO-2",
    "llava": """--gradient_checkpointing_kwargs '{"use_reentrant": false}'""",
    "internvl": """--gradient_checkpointing_kwargs '{"use_reentrant": false}'""",
}


def key_of(arguments: Any) -> str:
    """Return what switches reentrant checkpointing off in the trainer that these arguments belong to.

    Args:
        arguments: Its `TrainingArguments`, or those of a library that builds on transformers.
    """
    packages = [cls.__module__.partition(".")[0] for cls in type(arguments).__mro__]
    own = [_KEYS[package] for package in packages if package in _KEYS]
    field = next((name for name in CHECKPOINTING if hasattr(arguments, name)), CHECKPOINTING[-1])
    return own[0] if own else f"{field}_kwargs={{'use_reentrant': False}}"


def without_reentrant(arguments: Any) -> None:
    """Make the activation checkpointing of `TrainingArguments` non-reentrant; in older releases it is not by default.

    Raises:
        ReentrantCheckpointError: If they ask for the reentrant kind.
    """
    of_tower = getattr(arguments, "vit_gradient_checkpointing", False)  # ms-swift's, with the options of the other
    for name in CHECKPOINTING:
        options = getattr(arguments, f"{name}_kwargs", None)
        if isinstance(options, dict) and options.get("use_reentrant"):
            raise _refused("use_reentrant=True", key_of(arguments))
        if getattr(arguments, name, False) or (of_tower and name == "gradient_checkpointing"):
            setattr(arguments, f"{name}_kwargs", {**(options or {}), "use_reentrant": False})


def check_tower(vit: nn.Module, arguments: Any) -> None:
    """Refuse a tower whose reentrant checkpointing other code has switched on and the trainer will not set anew.

    Raises:
        ReentrantCheckpointError: If there is a block with it.
    """
    if any(getattr(arguments, name, False) for name in CHECKPOINTING):
        return
    for module in vit.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and _is_reentrant(checkpoint):
            raise _refused("reentrant activation checkpointing, switched on before the trainer", key_of(arguments))


def _is_reentrant(checkpoint: Any) -> bool:
    for function in _unwrapped(checkpoint):
        if isinstance(function, functools.partial) and function.func is torch.utils.checkpoint.checkpoint:
            return bool(function.keywords.get("use_reentrant"))
        owner = getattr(function, "__self__", None)  # the `apply` of an autograd function, which is always of this kind
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            return True
    return False


def _unwrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _refused(got: str, fix: str) -> ReentrantCheckpointError:
    return ReentrantCheckpointError(
        "Reentrant checkpointing gives the experts of a frozen ViT no gradient.",
        expected="use_reentrant=False",
        got=got,
        fix=fix,
    )
