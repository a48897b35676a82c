"""Wrapped ViTs in multimodal LLMs, their trainers and their codebases.

mllm/         attach(): a context-aware tower inside a multimodal LLM of transformers
chat/         conversations about pictures, covft.Chat
training/     callback, trainer, checkpoints, parts, recipes
tuning/       tune(): the tower by any method, language model and projector beside it
building/     multimodal LLMs from a pretrained tower and a pretrained language model
codebases/    LLaVA, InternVL, ms-swift and LLaMA-Factory, without editing their files

A training script needs this import alone: the data sets and options that it takes are exported here too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covft.data import CHAT_TEMPLATES as CHAT_TEMPLATES
    from covft.data import ConversationDataset as ConversationDataset
    from covft.data import DynamicTiling as DynamicTiling
    from covft.data import InternVLRows as InternVLRows
    from covft.data import LlavaRows as LlavaRows
    from covft.data import PadToSquare as PadToSquare
    from covft.data import pad_to_square as pad_to_square
    from covft.data import tile_image as tile_image
    from covft.integrations.building.build import build_internvl as build_internvl
    from covft.integrations.building.build import build_llava as build_llava
    from covft.integrations.building.build import image_text_of as image_text_of
    from covft.integrations.building.build import llava_processor as llava_processor
    from covft.integrations.building.loading import load_image_processor as load_image_processor
    from covft.integrations.building.loading import whole_weights as whole_weights
    from covft.integrations.building.projector import load_projector as load_projector
    from covft.integrations.building.projector import save_projector as save_projector
    from covft.integrations.building.saved import load_model as load_model
    from covft.integrations.building.saving import save_trained as save_trained
    from covft.integrations.building.tower import ViTTower as ViTTower
    from covft.integrations.building.tower import vit_tower as vit_tower
    from covft.integrations.mllm.attach import attach as attach
    from covft.integrations.mllm.attach import detach as detach
    from covft.integrations.mllm.attach import get_encoder as get_encoder
    from covft.integrations.training.callback import CoVFTCallback as CoVFTCallback
    from covft.integrations.training.checkpoints import check_checkpoint as check_checkpoint
    from covft.integrations.training.checkpoints import last_checkpoint as last_checkpoint
    from covft.integrations.training.movement import watch_movement as watch_movement
    from covft.integrations.training.parts import freeze_unread as freeze_unread
    from covft.integrations.training.parts import parts_of as parts_of
    from covft.integrations.training.parts import train_only as train_only
    from covft.integrations.training.recipes import RECIPES as RECIPES
    from covft.integrations.training.recipes import Recipe as Recipe
    from covft.integrations.training.trainer import MLLMTrainer as MLLMTrainer
    from covft.integrations.training.trainer import MLLMTrainingArguments as MLLMTrainingArguments
    from covft.integrations.tuning.tune import merge as merge
    from covft.integrations.tuning.tune import tune as tune
    from covft.integrations.tuning.tune import untune as untune
    from covft.utils.options import add_options as add_options
    from covft.utils.options import given_options as given_options
    from covft.utils.options import method_options as method_options

# Imported on first use: some of them need transformers. The names are relative to covft.
_HOMES = {
    "CHAT_TEMPLATES": "data",
    "CoVFTCallback": "integrations.training.callback",
    "ConversationDataset": "data",
    "DynamicTiling": "data",
    "InternVLRows": "data",
    "LlavaRows": "data",
    "MLLMTrainer": "integrations.training.trainer",
    "MLLMTrainingArguments": "integrations.training.trainer",
    "PadToSquare": "data",
    "RECIPES": "integrations.training.recipes",
    "Recipe": "integrations.training.recipes",
    "add_options": "utils.options",
    "ViTTower": "integrations.building.tower",
    "attach": "integrations.mllm.attach",
    "build_internvl": "integrations.building.build",
    "build_llava": "integrations.building.build",
    "check_checkpoint": "integrations.training.checkpoints",
    "detach": "integrations.mllm.attach",
    "freeze_unread": "integrations.training.parts",
    "get_encoder": "integrations.mllm.attach",
    "given_options": "utils.options",
    "image_text_of": "integrations.building.build",
    "last_checkpoint": "integrations.training.checkpoints",
    "llava_processor": "integrations.building.build",
    "load_image_processor": "integrations.building.loading",
    "load_model": "integrations.building.saved",
    "load_projector": "integrations.building.projector",
    "merge": "integrations.tuning.tune",
    "method_options": "utils.options",
    "pad_to_square": "data",
    "parts_of": "integrations.training.parts",
    "save_projector": "integrations.building.projector",
    "save_trained": "integrations.building.saving",
    "tile_image": "data",
    "train_only": "integrations.training.parts",
    "tune": "integrations.tuning.tune",
    "untune": "integrations.tuning.tune",
    "vit_tower": "integrations.building.tower",
    "watch_movement": "integrations.training.movement",
    "whole_weights": "integrations.building.loading",
}

__all__ = [
    "CHAT_TEMPLATES",
    "RECIPES",
    "CoVFTCallback",
    "ConversationDataset",
    "DynamicTiling",
    "InternVLRows",
    "LlavaRows",
    "MLLMTrainer",
    "MLLMTrainingArguments",
    "PadToSquare",
    "Recipe",
    "ViTTower",
    "add_options",
    "attach",
    "build_internvl",
    "build_llava",
    "check_checkpoint",
    "detach",
    "freeze_unread",
    "get_encoder",
    "given_options",
    "image_text_of",
    "last_checkpoint",
    "llava_processor",
    "load_image_processor",
    "load_model",
    "load_projector",
    "merge",
    "method_options",
    "pad_to_square",
    "parts_of",
    "save_projector",
    "save_trained",
    "tile_image",
    "train_only",
    "tune",
    "untune",
    "vit_tower",
    "watch_movement",
    "whole_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'covft.integrations' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"covft.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
