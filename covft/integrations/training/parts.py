"""Names the parts of a multimodal LLM, to train, freeze and give learning rates to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from covft.checkpoints.pretrained import prefix_of
from covft.errors import ConfigError
from covft.integrations.mllm.attachment import attachment_of, without_peft
from covft.integrations.mllm.families import find_tower
from covft.utils import parameters

PARTS = ("experts", "router", "norms", "vision", "projector", "llm")
COVFT = ("experts", "router", "norms")
# Modules between tower and language model, of any model.
_PROJECTORS = frozenset(
    ("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "image_newline", "mm_projector")
)
_ADDED_BY_PEFT = ("lora_", "modules_to_save")


def parts_of(model: nn.Module) -> dict[str, str]:
    """Return the part of each parameter.

    Args:
        model: A multimodal LLM, attached or not, also inside a PeftModel.

    Returns:
        By the names of `model.named_parameters()`: `"experts"`, `"router"` (with the context), `"norms"` (those of
        the tower that covft trains), `"vision"` (the rest of the tower), `"projector"` or `"llm"`.

    Raises:
        UnsupportedViTError: If the model has no tower.
    """
    attachment = attachment_of(model)
    tower = attachment.encoder.vit if attachment else find_tower(without_peft(model))[0]
    prefix = prefix_of(tower, model)
    parts: dict[str, str] = {}
    for name, _ in model.named_parameters():
        if not _PROJECTORS.isdisjoint(name.split(".")):
            parts[name] = "projector"
        elif name.startswith(prefix):
            part = attachment.encoder.part_of(name.removeprefix(prefix)) if attachment else "other"
            parts[name] = "vision" if part == "other" else part
        else:
            parts[name] = "llm"
    return parts


def train_only(model: nn.Module, parts: Iterable[str]) -> dict[str, int]:
    """Train some parts of a multimodal LLM, and freeze the others.

    Inside a PeftModel the part `"llm"` consists of the weights that peft added; those that it adapts stay frozen.

    Args:
        model: A multimodal LLM, attached or not.
        parts: Of `"projector"`, `"llm"`, `"vision"` (the tower's own weights), `"experts"`, `"router"`, `"norms"`,
            and `"covft"` for these three together.

    Returns:
        The number of trained parameters of each part.

    Raises:
        ConfigError: If the model does not have a part.
    """
    asked = {part for name in parts for part in (COVFT if name == "covft" else (name,))}
    owner = parts_of(model)
    present = set(owner.values())
    if attachment_of(model) is not None:
        present |= set(COVFT)  # with train_norms="none" or uniform routing some of them are empty
    if absent := asked - present:
        raise ConfigError(
            f"This model has no part {', '.join(sorted(absent))}.",
            expected=", ".join(part for part in PARTS if part in present),
            got=", ".join(sorted(asked)),
            fix="covft.attach(model, text_encoder, tokenizer=tokenizer) first" if absent & set(COVFT) else None,
        )
    adapted = hasattr(model, "peft_config")
    counts = dict.fromkeys(sorted(asked, key=PARTS.index), 0)
    for name, parameter in model.named_parameters():
        part = owner[name]
        trained = part in asked and parameter.is_floating_point()
        if adapted and part == "llm":
            trained = trained and any(mark in name for mark in _ADDED_BY_PEFT)
        parameter.requires_grad_(trained)
        if trained:
            counts[part] += parameters.count([parameter])
    return counts


def param_groups(
    model: nn.Module, rates: Mapping[str, float | None], lr: float, weight_decay: float, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """Group the trained parameters of a model for an optimizer, by part and weight decay.

    Args:
        model: A multimodal LLM.
        rates: Learning rate of each part; None or missing takes `lr`.
        lr: Learning rate of parts without their own.
        weight_decay: Weight decay of the matrices.
        decayed: Names of parameters that may be decayed; vectors and scalars are never decayed.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and `name`; each trained parameter is in exactly one.
    """
    return parameters.param_groups(
        model.named_parameters(),
        parts_of(model).__getitem__,
        lr=lr,
        rates=rates,
        weight_decay=weight_decay,
        decayed=set(decayed),
        order=PARTS,
    )
