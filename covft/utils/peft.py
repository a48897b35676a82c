"""Recognises what peft has added to a model, by the names of its classes: peft is never imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from covft.utils.torch_internals import CHECKPOINTED, COMPILED

# What peft, torch.compile and activation checkpointing put into the names of parameters that they wrap.
_WRAPPERS = frozenset(("base_layer", "original_module", COMPILED, CHECKPOINTED))


def is_adapter(module: nn.Module) -> bool:
    """Return whether peft has replaced a module: by a layer with adapters, or by a copy that it trains."""
    return _is_peft(module, "BaseTunerLayer") or _is_peft(module, "AuxiliaryTrainingWrapper")


def is_trained_copy(module: nn.Module) -> bool:
    """Return whether a module is one of `modules_to_save`: the original, and a copy that runs instead."""
    return _is_peft(module, "ModulesToSaveWrapper")


def adapter_parameters(model: nn.Module) -> dict[int, bool]:
    """Return the parameters that peft has added, by id, and whether their adapter is active.

    Args:
        model: Any module, inside a PeftModel or not.
    """
    found = {id(p): True for part in _prompt_encoders(model) for p in part.parameters()}
    for layer in model.modules():
        if not is_adapter(layer):
            continue
        active: Any = layer.active_adapters
        for name in layer.adapter_layer_names:  # type: ignore[union-attr]
            for key, value in _entries(layer, name):
                parameters = value.parameters() if isinstance(value, nn.Module) else (value,)
                found.update({id(p): key in active for p in parameters if isinstance(p, nn.Parameter)})
    return found


def plain_name(name: str) -> str:
    """Return the name that a parameter had before peft, torch.compile or checkpointing wrapped its module.

    Args:
        name: A dotted name.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _entries(layer: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a layer keeps for each adapter under a name."""
    holder: Any = layer
    for part in name.split("."):
        holder = getattr(holder, part, None)
    if isinstance(holder, nn.ModuleDict | nn.ParameterDict):
        yield from holder.items()


def _prompt_encoders(model: nn.Module) -> list[nn.Module]:
    prompts = getattr(model, "prompt_encoder", None) if hasattr(model, "peft_config") else None
    return [prompts] if isinstance(prompts, nn.Module) else []


def _is_peft(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith("peft.") for cls in type(module).__mro__)
