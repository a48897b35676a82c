"""Where a wrapped ViT meets multimodal LLMs, their trainers and their codebases.

mllm/         attach(): a context-aware tower inside a multimodal LLM of transformers
training/     callback, trainer, checkpoints, parts, recipes
building/     multimodal LLMs from a pretrained tower and a pretrained language model
codebases/    LLaVA, InternVL, ms-swift and LLaMA-Factory, without editing their files
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covft.integrations.building.build import build_internvl as build_internvl
    from covft.integrations.building.build import build_llava as build_llava
    from covft.integrations.building.build import freeze_unread as freeze_unread
    from covft.integrations.building.build import image_text_of as image_text_of
    from covft.integrations.building.build import llava_processor as llava_processor
    from covft.integrations.building.loading import load_image_processor as load_image_processor
    from covft.integrations.building.loading import whole_weights as whole_weights
    from covft.integrations.building.projector import load_projector as load_projector
    from covft.integrations.building.projector import save_projector as save_projector
    from covft.integrations.mllm.attach import attach as attach
    from covft.integrations.mllm.attach import detach as detach
    from covft.integrations.mllm.attach import get_encoder as get_encoder
    from covft.integrations.training.callback import CoVFTCallback as CoVFTCallback
    from covft.integrations.training.checkpoints import check_checkpoint as check_checkpoint
    from covft.integrations.training.checkpoints import last_checkpoint as last_checkpoint
    from covft.integrations.training.parts import parts_of as parts_of
    from covft.integrations.training.parts import train_only as train_only
    from covft.integrations.training.recipes import RECIPES as RECIPES
    from covft.integrations.training.recipes import Recipe as Recipe
    from covft.integrations.training.trainer import MLLMTrainer as MLLMTrainer
    from covft.integrations.training.trainer import MLLMTrainingArguments as MLLMTrainingArguments

# Imported when first asked for: some of them need transformers.
_HOMES = {
    "CoVFTCallback": "training.callback",
    "MLLMTrainer": "training.trainer",
    "MLLMTrainingArguments": "training.trainer",
    "RECIPES": "training.recipes",
    "Recipe": "training.recipes",
    "attach": "mllm.attach",
    "build_internvl": "building.build",
    "build_llava": "building.build",
    "check_checkpoint": "training.checkpoints",
    "detach": "mllm.attach",
    "freeze_unread": "building.build",
    "get_encoder": "mllm.attach",
    "image_text_of": "building.build",
    "last_checkpoint": "training.checkpoints",
    "llava_processor": "building.build",
    "load_image_processor": "building.loading",
    "load_projector": "building.projector",
    "parts_of": "training.parts",
    "save_projector": "building.projector",
    "train_only": "training.parts",
    "whole_weights": "building.loading",
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
