"""Names the parts of a multimodal LLM, which are trained, frozen and given learning rates separately."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from covft.adapters.registry import describe
from covft.checkpoints.pretrained import prefix_of
from covft.encoder import ContextEncoder
from covft.errors import ConfigError
from covft.integrations.mllm.attachment import attachment_of, without_peft
from covft.integrations.mllm.families import CONNECTORS, find_tower
from covft.surgery.adapted import AdaptedViT
from covft.tuning.tuned import TunedViT
from covft.utils import parameters
from covft.utils.arguments import check_kinds
from covft.utils.peft import adapter_parameters

PARTS = ("experts", "router", "norms", "attention", "vision", "projector", "llm")
COVFT = ("experts", "router", "norms")  # and "attention", where it has updates


@check_kinds
def parts_of(model: nn.Module) -> dict[str, str]:
    """Return the part that each parameter belongs to.

    Args:
        model: A multimodal LLM, attached or not, also inside a PeftModel.

    Returns:
        Part by name in `model.named_parameters()`: `"experts"`, `"router"` (with the context), `"norms"` (of the tower,
        where covft trains them), `"attention"` (updates of `attention_rank`), `"vision"` (the rest of the tower),
        `"projector"` or `"llm"`.

    Raises:
        UnsupportedViTError: If the model has no tower.
    """
    attachment = attachment_of(model)
    tower = attachment.encoder.vit if attachment else find_tower(without_peft(model))[0]
    prefix = prefix_of(tower, model)
    parts: dict[str, str] = {}
    for name, _ in model.named_parameters():
        if not CONNECTORS.isdisjoint(name.split(".")):
            parts[name] = "projector"
        elif name.startswith(prefix):
            inner = name.removeprefix(prefix)
            parts[name] = part_in_model(attachment.encoder, inner) if attachment else "vision"
        else:
            parts[name] = "llm"
    return parts


def part_in_model(encoder: AdaptedViT, name: str) -> str:
    """Return the part of a multimodal LLM that a parameter of its tower belongs to.

    Args:
        encoder: The tower.
        name: Name of the parameter in the ViT.
    """
    part = encoder.part_of(name)
    return "vision" if part == "other" else part


@check_kinds
def train_only(model: nn.Module, parts: Iterable[str], *, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Train these parts of a multimodal LLM, and freeze everything else.

    Where peft has put adapters into a part, the part means these adapters; its other weights stay frozen. In a tower
    that `covft.tune` has tuned, `"vision"` means what its method trains.

    Args:
        model: A multimodal LLM, attached or not.
        parts: Of `"projector"`, `"llm"`, `"vision"` (the tower's own weights, without those that `freeze_unread`
            freezes), `"experts"`, `"router"`, `"norms"`, `"attention"` (updates of `attention_rank`), and `"covft"` for
            these four together.
        dtype: Type to cast the trained parameters to: in half precision, an optimizer's small steps are rounded away.
            None casts nothing; what covft adds is kept in float32 by `CoVFTCallback` all the same.

    Returns:
        Number of trained parameters of each part.

    Raises:
        ConfigError: If a part is unknown, or the model does not have it.
    """
    owner = parts_of(model)
    present = set(owner.values())
    ours = (*COVFT, "attention") if "attention" in present else COVFT
    asked = {part for name in parts for part in (ours if name == "covft" else (name,))}
    attachment = attachment_of(model)
    if attachment is not None and isinstance(attachment.encoder, ContextEncoder):
        present |= set(COVFT)  # with train_norms="none" or uniform routing some of them are empty
    if absent := asked - present:
        raise ConfigError(
            f"This model has no part {', '.join(sorted(absent))}.",
            expected=", ".join(part for part in PARTS if part in present),
            got=", ".join(sorted(asked)),
            fix="covft.attach(model, text_encoder, tokenizer=tokenizer) first" if absent & set(COVFT) else None,
        )
    adapters = adapter_parameters(model)
    by_peft = {owner[name] for name, parameter in model.named_parameters() if id(parameter) in adapters}
    chosen = _chosen_by_method(model)
    for name, parameter in model.named_parameters():
        trained = owner[name] in asked and parameter.is_floating_point()
        if chosen is not None and owner[name] in ("vision", "projector"):
            trained = trained and chosen.allows(parameter, owner[name])
        elif owner[name] in by_peft:
            trained = trained and adapters.get(id(parameter), False)  # of an active adapter
        parameter.requires_grad_(trained)
    if attachment is not None:
        attachment.encoder.chosen_parts = frozenset(asked)
    if "vision" in asked:
        freeze_unread(model)
    if attachment is not None and dtype == torch.float32:
        attachment.encoder.train_in_float32()
    counts = dict.fromkeys(sorted(asked, key=PARTS.index), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[owner[name]] += parameters.count([parameter])
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)
    return counts


class _Chosen(NamedTuple):
    """What the method of a tower trains, and what no longer runs, by id."""

    trained: set[int]
    idle: set[int]

    def allows(self, parameter: nn.Parameter, part: str) -> bool:
        """Return whether a parameter of the tower or the projector may be trained."""
        return id(parameter) in self.trained if part == "vision" else id(parameter) not in self.idle


def _chosen_by_method(model: nn.Module) -> _Chosen | None:
    """Return what the method of the tower trains; None where that is covft, or nothing was attached."""
    attachment = attachment_of(model)
    if attachment is None or not isinstance(attachment.encoder, TunedViT):
        return None
    trained, idle = attachment.encoder.adapted_parameters().values(), attachment.encoder.change.idle_parameters()
    return _Chosen({id(parameter) for parameter in trained}, {id(parameter) for parameter in idle})


@check_kinds
def freeze_unread(model: nn.Module) -> list[str]:
    """Freeze the parameters of the tower that no loss depends on.

    These are mask tokens and everything after the hidden state that the model reads (`vision_feature_layer` of its
    config). DDP waits for the gradient of every trained parameter: with LLaVA's penultimate layer, training the entire
    tower would hang at the last block.

    Args:
        model: A multimodal LLM, attached or not.

    Returns:
        Names of these parameters, in the tower.
    """
    target, attachment = without_peft(model), attachment_of(model)
    tower = attachment.encoder.vit if attachment else find_tower(target)[0]
    layers = getattr(target.config, "vision_feature_layer", None)
    first_unread = None
    if layers is not None:
        blocks = (attachment.encoder.spec if attachment else describe(tower)).blocks
        states = (layers,) if isinstance(layers, int) else layers
        read = max(state if state >= 0 else len(blocks) + 1 + state for state in states)
        first_unread = f"{blocks[read].path}." if read < len(blocks) else None
    names, after = [], False
    never = set(getattr(tower, "unread", list)())  # of a `ViTTower`
    for name, parameter in tower.named_parameters():
        # Towers register their modules in the order in which they run.
        if attachment is not None and part_in_model(attachment.encoder, name) != "vision":
            continue  # what was added, and is read
        after = after or (first_unread is not None and name.startswith(first_unread))
        if after or name in never or name.endswith("mask_token"):
            parameter.requires_grad_(False)
            names.append(name)
    return names


def param_groups(
    model: nn.Module, rates: Mapping[str, float | None], lr: float, weight_decay: float, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """Group the trained parameters of a model for an optimizer: one group per part, with and without decay.

    Args:
        model: A multimodal LLM.
        rates: Learning rate of each part; None or missing takes `lr`.
        lr: Learning rate of every part without its own.
        weight_decay: Weight decay of the matrices.
        decayed: Names of parameters that may be decayed; the vectors and scalars among them are not.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and `name`; every trained parameter is in exactly one.
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
