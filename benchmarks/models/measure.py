"""Builds each model on the meta device, attaches it, and counts."""

from __future__ import annotations

import copy
from typing import Any

import torch

import covft
from benchmarks.models.checkpoints import Checkpoint
from covft.integrations.mllm.attachment import read_layers
from covft.integrations.mllm.families import find_tower

TEXT_DIM = 768  # BERT


def measure(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `covft.attach` does to a model with its default settings.

    Args:
        checkpoint: The model. Its language model is left small: attach does not touch it.
    """
    with torch.device("meta"):
        model = build(checkpoint)
        tower, family = find_tower(model)
        before = _count(tower)
        covft.attach(model, TEXT_DIM, tokenizer=None)
    encoder = covft.get_encoder(model)
    widths = {block.embed_dim for block in encoder.spec.blocks}
    assert len(widths) == 1
    read = read_layers(model)
    return {
        "page": checkpoint.page,
        "names": list(checkpoint.names),
        "model": checkpoint.model,
        "tower": type(tower).__name__,
        "layout": family.layout,
        "blocks": encoder.spec.depth,
        "width": widths.pop(),
        "parameters": before,
        "read": -1 if read is None else read,
        "also": _also(model.config.vision_config),
        "layers": list(encoder.layers),
        "added": _count(tower) - before,
        "trained": sum(p.numel() for p in encoder.trainable_parameters()),
    }


def build(checkpoint: Checkpoint) -> Any:
    """Build a model with a tower of the real size and a language model of one layer.

    Args:
        checkpoint: Which.
    """
    import transformers

    cls = getattr(transformers, checkpoint.model)
    default = cls.config_class()
    text = default.text_config.to_dict()
    text |= {"num_hidden_layers": 1, "layer_types": None, "cross_attention_layers": [0]}
    text = {name: value for name, value in text.items() if name in default.text_config.to_dict()}
    vision = copy.deepcopy(checkpoint.vision)
    if "model_type" not in vision:
        vision = {**default.vision_config.to_dict(), **vision}
    return cls(cls.config_class(vision_config=vision, text_config=text, **checkpoint.settings))


def _also(vision: Any) -> list[int]:
    """Return the blocks before the last whose outputs are read, too."""
    after = getattr(vision, "deepstack_visual_indexes", None) or []
    states = getattr(vision, "intermediate_layers_indices", None) or []  # of hidden states; 0 is the embeddings
    return [*after, *(state - 1 for state in states)]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
