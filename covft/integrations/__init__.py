"""Where a wrapped ViT meets a multimodal LLM and its trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from covft.integrations.attaching import attach, detach, get_encoder

if TYPE_CHECKING:
    from covft.integrations.assembling import build_internvl as build_internvl
    from covft.integrations.assembling import build_llava as build_llava
    from covft.integrations.assembling import freeze_unread as freeze_unread
    from covft.integrations.assembling import image_text_of as image_text_of
    from covft.integrations.assembling import llava_processor as llava_processor
    from covft.integrations.assembling import load_image_processor as load_image_processor
    from covft.integrations.assembling import load_projector as load_projector
    from covft.integrations.assembling import save_projector as save_projector
    from covft.integrations.assembling import whole_weights as whole_weights
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
    "build_internvl": "assembling",
    "build_llava": "assembling",
    "freeze_unread": "assembling",
    "image_text_of": "assembling",
    "llava_processor": "assembling",
    "load_image_processor": "assembling",
    "load_projector": "assembling",
    "save_projector": "assembling",
    "whole_weights": "assembling",
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
    "build_internvl",
    "build_llava",
    "check_checkpoint",
    "detach",
    "freeze_unread",
    "get_encoder",
    "image_text_of",
    "last_checkpoint",
    "llava_processor",
    "load_image_processor",
    "load_projector",
    "parts_of",
    "save_projector",
    "train_only",
    "whole_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'covft.integrations' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"covft.integrations.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
