"""Checks that a training reaches the adapted tower, whatever other libraries have frozen since."""

from __future__ import annotations

import re
import warnings

from torch import nn

from covft.encoder import ContextEncoder
from covft.errors import MissingGradientError
from covft.integrations.mllm.attach import get_encoder
from covft.integrations.mllm.attachment import attachment_of
from covft.integrations.training.parts import part_in_model
from covft.surgery.adapted import AdaptedViT
from covft.surgery.attention import updated_layers
from covft.tuning.tuned import TunedViT
from covft.utils.peft import adapter_parameters, is_adapter

_FIX = "covft.get_encoder(model).unfreeze(), after the call that froze it"


def after_peft(model: nn.Module) -> None:
    """Train the tower again if get_peft_model has frozen it with everything else; warn of adapters inside experts.

    Args:
        model: An attached model, inside a PeftModel or not.

    Raises:
        UnsupportedViTError: If peft trains a copy of the tower instead of the tower.
    """
    attachment = attachment_of(model)
    assert attachment is not None, "attached by the callback"
    attachment.check_tower()
    encoder = attachment.encoder
    slots = encoder.slots() if isinstance(encoder, ContextEncoder) else {}
    inside = [
        f"{layer}: {name}"
        for layer, slot in slots.items()
        for name, module in slot.named_modules()
        if is_adapter(module)
    ]
    inside += [path for path in updated_layers(encoder.vit) if path.endswith(".base_layer")]
    if inside:
        warnings.warn(
            f"peft has put adapters into {len(inside)} layers of experts, routers, contexts and attentions that covft "
            f"trains ({inside[0]}, ...), "
            "whose own weights are frozen. If target_modules was not meant to reach them: "
            "LoraConfig(..., exclude_modules=covft.lora_exclude(model)).",
            UserWarning,
            stacklevel=2,
        )
    if hasattr(model, "peft_config") and encoder.chosen_parts is None and not _trained(encoder):
        encoder.unfreeze()


def check_trainable(model: nn.Module, reaction: str = "raise") -> None:
    """Raise if nothing that covft adds is trained, and warn if only some of it is.

    What `train_only` has left out is left out on purpose.

    Args:
        model: An attached model, inside a PeftModel or not.
        reaction: To a frozen tower: `"raise"`, `"warn"` or `"ignore"`.

    Raises:
        MissingGradientError: If everything is frozen.
    """
    encoder = get_encoder(model)
    expected = {
        name: parameter
        for name, parameter in encoder.adapted_parameters().items()
        if encoder.chosen_parts is None or part_in_model(encoder, name) in encoder.chosen_parts
    }
    frozen = [name for name, parameter in expected.items() if not parameter.requires_grad]
    if not frozen or reaction == "ignore":
        return
    got = ", ".join(frozen[:3]) + (", ..." if len(frozen) > 3 else "")
    if len(frozen) < len(expected) or _adapters_train(encoder):
        warnings.warn(
            f"{len(frozen)} of {len(expected)} tensors that covft trains are frozen: {got}. If that is not meant: "
            f"{_FIX}; covft.integrations.train_only(model, parts) chooses parts without this warning.",
            UserWarning,
            stacklevel=2,
        )
        return
    error = MissingGradientError(
        f"All {len(expected)} tensors that covft trains were frozen after attach().",
        expected=f"{_what_trains(encoder)} with requires_grad",
        got=f"requires_grad=False, {_who_froze(model)}",
        fix=f"{_FIX}, or covft.integrations.train_only(model, ['covft', ...])",
    )
    if reaction == "raise":
        raise error
    warnings.warn(str(error), UserWarning, stacklevel=2)


def lora_exclude(model: nn.Module) -> str:
    """Return what keeps peft off what covft has put into the tower, for `LoraConfig(exclude_modules=...)`.

    Args:
        model: An attached model, or what `covft.wrap` or `covft.tune` returned.

    Returns:
        A regular expression for the paths of the adapted FFNs and of attentions with updates, or of what the method
        has added or replaced, and everything in them.

    Raises:
        UnsupportedViTError: If the model is not attached.

    Example:
        >>> lora = LoraConfig(target_modules="all-linear", exclude_modules=lora_exclude(model))  # doctest: +SKIP
    """
    encoder = model if isinstance(model, AdaptedViT) else get_encoder(model)
    if isinstance(encoder, ContextEncoder):
        own = [*encoder.original.ffns, *updated_layers(encoder.vit)]
    elif isinstance(encoder, TunedViT):
        idle = {id(override.owner) for override in encoder.change.overrides}
        own = [*encoder.change.added, *encoder.change.replaced]
        own += [name for name, module in model.named_modules() if id(module) in idle]
    else:
        own = []
    if not own:
        return r"(?!)"  # nothing
    paths = "|".join(map(re.escape, own))
    return rf"(.*\.)?({paths})(\..*)?"


def _what_trains(encoder: AdaptedViT) -> str:
    is_covft = isinstance(encoder, ContextEncoder)
    return "experts, routers, contexts and norms" if is_covft else f"what {encoder.settings()['method']!r} trains"


def _trained(encoder: AdaptedViT) -> bool:
    return any(p.requires_grad for p in encoder.adapted_parameters().values()) or _adapters_train(encoder)


def _adapters_train(encoder: AdaptedViT) -> bool:
    """Whether peft's adapters inside the adapted FFNs are trained."""
    if not isinstance(encoder, ContextEncoder):
        return False
    adapters = adapter_parameters(encoder.vit)
    slots = encoder.slots().values()
    return any(p.requires_grad and id(p) in adapters for slot in slots for p in slot.parameters())


def _who_froze(model: nn.Module) -> str:
    if hasattr(model, "peft_config"):
        return "as peft sets it for everything that exists when get_peft_model is called"
    if any(p.requires_grad for p in model.parameters()):
        return "by requires_grad_(False) on the tower"
    return "by requires_grad_(False) or prepare_model_for_kbit_training on the model"
