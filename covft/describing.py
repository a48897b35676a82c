"""Counts what `covft describe` prints, on a device that holds no numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from covft.adapters.registry import describe as describe_vit
from covft.adapters.sources import load_vit
from covft.nn.cost import count_flops, count_parameters
from covft.surgery.attention import is_update
from covft.tuning.budget import budget
from covft.tuning.registry import make_method
from covft.utils.parameters import count
from covft.wrapping import wrap


def cost(source: str, method: str, options: dict[str, Any], *, text_dim: int) -> dict[str, Any]:
    """Return what `describe --method` prints, as JSON values.

    Args:
        source: `timm:NAME`, `open_clip:NAME` or `hf:ID_OR_FOLDER`.
        method: Name of the method.
        options: Its options.
        text_dim: Width C of the text features.

    Raises:
        CoVFTError: Whatever `covft.tune` would refuse, and models that cannot be built.
    """
    vit = load_vit(source, pretrained=False, device="meta")
    spec, found = describe_vit(vit), budget(vit, method, text_dim=text_dim, **options)
    return {
        **_of_vit(source, spec),
        "parameters": sum(parameter.numel() for parameter in vit.parameters()),
        "method": method,
        "options": make_method(method, options).to_dict(),
        "trained_parameters": found.parameters,
        "added_parameters": found.added,
        "forward_flops": found.forward_flops,
        "step_flops": found.step_flops,
        "kept_bytes": found.kept_bytes,
    }


def _of_vit(source: str, spec: Any) -> dict[str, Any]:
    return {
        "model": source,
        "library": spec.library,
        "class_name": spec.class_name,
        "depth": spec.depth,
        "layout": spec.input.layout,
    }


def gather(source: str, *, text_dim: int, tokens: int | None = None, **settings: Any) -> dict[str, Any]:
    """Return what `describe` prints, as JSON values.

    Args:
        source: `timm:NAME`, `open_clip:NAME` or `hf:ID_OR_FOLDER`.
        text_dim: Width C of the text features.
        tokens: Tokens per image N; by default those that the model says.
        **settings: Keywords of `covft.wrap`.

    Raises:
        CoVFTError: Whatever `covft.wrap` would refuse, and models that cannot be built.
    """
    vit = load_vit(source, pretrained=False, device="meta")
    vit_parameters = sum(parameter.numel() for parameter in vit.parameters())
    # Wrapped for real, on a device that holds no numbers: all checks run, and nothing is estimated.
    encoder = wrap(vit, text_dim, **settings)
    spec, config = encoder.spec, encoder.covft_config
    # A ViT with stages merges tokens on its way: one number would be wrong for most of its blocks.
    has_stages = len({block.embed_dim for block in spec.blocks}) > 1
    num_tokens = None if has_stages else tokens or spec.num_tokens
    blocks = [
        {
            **dataclasses.asdict(block),
            "norms": list(block.norms),
            "wrapped": block.index in encoder.layers,
            "added": _added(encoder, block, text_dim, num_tokens) if block.index in encoder.layers else None,
        }
        for block in spec.blocks
    ]
    added = [block["added"] for block in blocks if block["added"] is not None]
    flops = None if num_tokens is None else sum(sum(a["flops"].values()) - a["flops_replaced"] for a in added)
    trained = sum(p.numel() for p in encoder.vit.parameters() if p.requires_grad)
    parameters = sum(sum(a["parameters"].values()) for a in added) + (text_dim if config.null_text else 0)
    return {
        **_of_vit(source, spec),
        "image_size": spec.image_size,
        "num_tokens": num_tokens,
        "num_prefix_tokens": spec.input.prefix_tokens,
        "parameters": vit_parameters,
        "config": config.to_dict(),
        "text_dim": text_dim,
        "adapted_parameters": parameters,
        "net_parameters": parameters - sum(a["parameters_replaced"] for a in added),
        "trained_parameters": trained,
        "net_flops": flops,
        "blocks": blocks,
    }


def _added(encoder: Any, block: Any, text_dim: int, num_tokens: int | None) -> dict[str, Any]:
    """Count parameters and FLOPs of one adapted block, by part, and those of the FFN that it replaces."""
    config = encoder.covft_config
    experts = encoder.vit.get_submodule(block.mlp_path).experts
    ffn_weights = _matrix_elements(experts.prototype)
    sizes = {
        "embed_dim": block.embed_dim,
        "text_dim": text_dim,
        "num_experts": config.experts,
        "routing": config.routing,
        "context": config.context,
    }
    flops = None
    if num_tokens is not None:
        flops = count_flops(
            **sizes,
            ffn_weights=ffn_weights,
            num_tokens=num_tokens,
            top_k=config.top_k,
            num_heads=config.num_heads,
        )
        if config.expert_rank is not None:  # the shared FFN runs once, the thin matrices of each expert after it
            flops = dataclasses.replace(flops, experts=2 * num_tokens * _matrix_elements(experts))
    counted = count_parameters(**sizes, ffn_parameters=block.ffn_parameters)
    parameters = dataclasses.asdict(dataclasses.replace(counted, experts=count(experts.parameters())))
    costs = None if flops is None else dataclasses.asdict(flops)
    first = next(layer for layer in encoder.layers if encoder.spec.blocks[layer].path == block.path)
    if config.attention_rank is not None and block.index == first:  # of several FFNs in a block
        parameters["updates"] = sum(
            p.numel() for name, p in encoder.vit.get_submodule(block.path).named_parameters() if is_update(name)
        )
        if costs is not None:
            assert num_tokens is not None, "or there were no FLOPs"
            costs["updates"] = 2 * num_tokens * parameters["updates"]
    return {
        "parameters": parameters,
        "parameters_replaced": block.ffn_parameters,
        "flops": costs,
        "flops_replaced": None if num_tokens is None else 2 * num_tokens * ffn_weights,
    }


def _matrix_elements(module: Any) -> int:
    named = module.named_parameters()  # biases of low-rank experts are stacked, so they have two axes as well
    return sum(p.numel() for name, p in named if p.dim() > 1 and not name.endswith("bias"))
