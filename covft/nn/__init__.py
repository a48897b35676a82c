"""The maths of CoVFT: torch only, no knowledge of any ViT or MLLM."""

from covft.nn.context import (
    ConcatContext,
    ContextExtractor,
    CrossAttentionContext,
    ImageContext,
    QuickGELU,
    ResidualRefinement,
    SingleQueryAttention,
    TextContext,
)
from covft.nn.experts import Experts
from covft.nn.losses import load_balance_loss, router_z_loss
from covft.nn.moe import ContextualMoE
from covft.nn.router import DenseRouter, RandomRouter, Router, Routing, SparseRouter, UniformRouter
from covft.nn.segments import Segments

__all__ = [
    "ConcatContext",
    "ContextExtractor",
    "ContextualMoE",
    "CrossAttentionContext",
    "DenseRouter",
    "Experts",
    "ImageContext",
    "QuickGELU",
    "RandomRouter",
    "ResidualRefinement",
    "Router",
    "Routing",
    "Segments",
    "SingleQueryAttention",
    "SparseRouter",
    "TextContext",
    "UniformRouter",
    "load_balance_loss",
    "router_z_loss",
]
