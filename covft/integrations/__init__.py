"""Where a wrapped ViT meets a multimodal LLM and its trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from covft.integrations.attaching import attach, detach, get_encoder

if TYPE_CHECKING:
    from covft.integrations.callback import CoVFTCallback as CoVFTCallback
    from covft.integrations.checkpoints import check_checkpoint as check_checkpoint
    from covft.integrations.checkpoints import last_checkpoint as last_checkpoint
    from covft.integrations.recipes import RECIPES as RECIPES
    from covft.integrations.recipes import Recipe as Recipe
    from covft.integrations.roles import parts_of as parts_of
    from covft.integrations.roles import train_only as train_only
    from covft.integrations.trainer import MLLMTrainer as MLLMTrainer
    from covft.integrations.trainer import MLLMTrainingArguments as MLLMTrainingArguments

# Imported when first asked for: some of them need transformers.
_HOMES = {
    "CoVFTCallback": "callback",
    "MLLMTrainer": "trainer",
    "MLLMTrainingArguments": "trainer",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "check_checkpoint": "checkpoints",
    "last_checkpoint": "checkpoints",
    "parts_of": "roles",
    "train_only": "roles",
}

__all__ = [
    "RECIPES",
    "CoVFTCallback",
    "MLLMTrainer",
    "MLLMTrainingArguments",
    "Recipe",
    "attach",
    "check_checkpoint",
    "detach",
    "get_encoder",
    "last_checkpoint",
    "parts_of",
    "train_only",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'covft.integrations' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"covft.integrations.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
