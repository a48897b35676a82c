"""Switches activation checkpointing of a model on and off, under the name of the installed transformers."""

from __future__ import annotations

from typing import Any

from covft.utils.transformers_names import CHECKPOINTING, training_field


def recompute(model: Any, *, on: bool = True, reentrant: bool = False, **more: Any) -> None:
    """Call the switch of a model of transformers."""
    name = next(name for name in CHECKPOINTING if hasattr(model, f"{name}_enable"))
    if on:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}}, **more)
    else:
        getattr(model, f"{name}_disable")()


def training_fields(*, reentrant: bool = False) -> dict[str, Any]:
    """Fields of `TrainingArguments` that switch it on."""
    name = training_field()
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
