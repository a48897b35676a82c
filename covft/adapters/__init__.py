"""How each library builds a ViT: where its blocks, FFNs and norms are. Nothing here runs a model."""

from covft.adapters.fake import ToyViT
from covft.adapters.families import ViTFamily
from covft.adapters.registry import describe, list_adapters, register_adapter
from covft.adapters.spec import Adapter, BlockSpec, ViTSpec

__all__ = ["Adapter", "BlockSpec", "ToyViT", "ViTFamily", "ViTSpec", "describe", "list_adapters", "register_adapter"]
