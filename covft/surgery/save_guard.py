"""Recognises `save_pretrained` of transformers and of peft around the caller.

A model that holds a wrapped ViT, and that covft has not attached, collects its state dict by itself. Nothing but the
call stack tells that this state dict is about to be written to a file. The stack is searched for the code of
`PreTrainedModel.save_pretrained` itself, wherever transformers keeps it, and only its documented parameters are read.
The same goes for `PeftModel.save_pretrained`, which writes adapters alone.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from covft.errors import CheckpointError, UnsupportedVersionError
from covft.utils.sharding import shape_of

_PARAMETERS = ("self", "save_directory", "is_main_process", "state_dict")
_PARAMETERS_OF_PEFT = ("self", "save_directory", "is_main_process", "kwargs")


class RunningSave(NamedTuple):
    """A call of `save_pretrained` that has not returned yet.

    Attributes:
        model: The model that is saved.
        directory: Where it goes.
        state_dict: What is saved, if the caller gave it or transformers has collected it.
        writes: Whether this process writes.
    """

    model: nn.Module
    directory: str
    state_dict: Mapping[str, Any] | None
    writes: bool


def running_save() -> RunningSave | None:
    """Return the call of transformers' `save_pretrained` that the caller runs in; None if there is none.

    Raises:
        UnsupportedVersionError: If its parameters are not those that covft knows.
    """
    frame = _frame_of(_code_of_save())
    if frame is None:
        return None
    model, directory, main, state = (frame.f_locals[name] for name in _PARAMETERS)
    return RunningSave(model, directory, state, frame.f_locals.get("save_on_this_rank", main))


def running_adapter_save() -> RunningSave | None:
    """Return the call of peft's `save_pretrained` that the caller runs in; None if there is none."""
    frame = _frame_of(_code_of_adapter_save())
    if frame is None:
        return None
    model, directory, main, options = (frame.f_locals[name] for name in _PARAMETERS_OF_PEFT)
    return RunningSave(model, directory, options.get("state_dict"), main)


def check_save_pretrained() -> None:
    """Refuse a transformers whose `save_pretrained` could not be recognised.

    Raises:
        UnsupportedVersionError: If its parameters are not those that covft knows.
    """
    _code_of_save()


def refuse_runtime_names(slot: nn.Module) -> None:
    """Refuse to let transformers write the names of an adapted FFN into a file.

    `from_pretrained` would not find the FFN there, and would initialise a new one.

    Raises:
        CheckpointError: If such a file is about to be written.
    """
    save = running_save()
    if save is None or not save.state_dict:
        return
    path = next((name for name, module in save.model.named_modules() if module is slot), None)
    found = [] if path is None else _names_of(slot, path, save)
    if found:
        raise CheckpointError(
            f"{type(save.model).__name__} holds a context-aware ViT, and this state dict has names that "
            "from_pretrained does not know: it would initialise those FFNs anew.",
            expected="model.save_pretrained(folder) without state_dict=, which writes the original FFNs",
            got=f"{len(found)} names such as {found[0]}",
            fix="covft.attach(model, ...) instead of covft.wrap(tower, ...), which takes state dicts; or "
            "encoder.save_pretrained(folder) for the ViT",
        )


def _frame_of(code: CodeType | None) -> FrameType | None:
    """Return the innermost frame of the stack that runs this code."""
    frame = sys._getframe(1) if code is not None else None
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _code_of_adapter_save() -> CodeType | None:
    """Return the code of peft's `save_pretrained`; None while peft is not imported, or if it is not the known one."""
    peft: Any = sys.modules.get("peft.peft_model")
    if peft is None or not hasattr(peft, "PeftModel"):
        return None
    code: CodeType = inspect.unwrap(peft.PeftModel.save_pretrained).__code__
    return code if set(_PARAMETERS_OF_PEFT) <= set(code.co_varnames) else None


def _names_of(slot: nn.Module, path: str, save: RunningSave) -> list[str]:
    """Return the names of a slot's experts in a state dict; release 4 of transformers has replaced their prefix."""
    assert save.state_dict is not None
    shapes = {name: shape_of(p) for name, p in slot.named_parameters() if name.startswith("experts.")}
    others = {name for name, _ in save.model.named_parameters()} - {f"{path}.{name}" for name in shapes}
    end = ".".join(path.split(".")[-3:])
    found = []
    for name, tensor in save.state_dict.items():
        _, here, inner = name.rpartition(f"{end}.")
        if here and inner in shapes and name not in others and shape_of(tensor) == shapes[inner]:
            found.append(name)
    return found


def _code_of_save() -> CodeType | None:
    """Return the code of transformers' `save_pretrained`; None while transformers is not imported."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or "transformers.modeling_utils" not in sys.modules:
        return None
    code = inspect.unwrap(transformers.PreTrainedModel.save_pretrained).__code__
    missing = [
        name for name in _PARAMETERS if name not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    ]
    if missing:
        raise UnsupportedVersionError(
            "covft does not know save_pretrained of this transformers, so a wrapped ViT could be saved wrongly.",
            expected=f"PreTrainedModel.save_pretrained({', '.join(_PARAMETERS)}, ...)",
            got=f"transformers {transformers.__version__}, without {', '.join(missing)}",
            fix="encoder.save_pretrained(folder), which does not need it",
        )
    return code
