"""Describes how each library builds a ViT: its blocks, FFNs and norms, and the format of its input. Runs no model."""

from covft.adapters.families import ViTFamily
from covft.adapters.input_format import InputFormat
from covft.adapters.registry import describe, list_adapters, register_adapter
from covft.adapters.spec import Adapter, BlockSpec, ViTSpec

__all__ = [
    "Adapter",
    "BlockSpec",
    "InputFormat",
    "ViTFamily",
    "ViTSpec",
    "describe",
    "list_adapters",
    "register_adapter",
]
