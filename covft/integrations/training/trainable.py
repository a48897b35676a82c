"""Checks that a training reaches the adapted tower, whatever other libraries have frozen since."""

from __future__ import annotations

import re
import warnings

from torch import nn

from covft.encoder import ContextEncoder
from covft.errors import MissingGradientError
from covft.integrations.mllm.attach import get_encoder
from covft.integrations.mllm.attachment import attachment_of
from covft.surgery.attention import updated_layers
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
    inside = [
        f"{layer}: {name}"
        for layer, slot in encoder.slots().items()
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
        if encoder.chosen_parts is None or encoder.part_of(name) in encoder.chosen_parts
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
        expected="experts, routers, contexts and norms with requires_grad",
        got=f"requires_grad=False, {_who_froze(model)}",
        fix=f"{_FIX}, or covft.integrations.train_only(model, ['covft', ...])",
    )
    if reaction == "raise":
        raise error
    warnings.warn(str(error), UserWarning, stacklevel=2)


def lora_exclude(model: nn.Module) -> str:
    """Return what keeps peft off everything that covft adds, for `LoraConfig(exclude_modules=...)`.

    Args:
        model: An attached model, or what `covft.wrap` returned.

    Returns:
        A regular expression for the paths of the adapted FFNs and of attentions with updates, and everything in them.

    Raises:
        UnsupportedViTError: If the model is not attached.

    Example:
        >>> lora = LoraConfig(target_modules="all-linear", exclude_modules=lora_exclude(model))  # doctest: +SKIP
    """
    encoder = model if isinstance(model, ContextEncoder) else get_encoder(model)
    paths = "|".join(re.escape(path) for path in (*encoder.original.ffns, *updated_layers(encoder.vit)))
    return rf"(.*\.)?({paths})(\..*)?"


def _trained(encoder: ContextEncoder) -> bool:
    return any(p.requires_grad for p in encoder.adapted_parameters().values()) or _adapters_train(encoder)


def _adapters_train(encoder: ContextEncoder) -> bool:
    """Whether peft's adapters inside the adapted FFNs are trained."""
    adapters = adapter_parameters(encoder.vit)
    slots = encoder.slots().values()
    return any(p.requires_grad and id(p) in adapters for slot in slots for p in slot.parameters())


def _who_froze(model: nn.Module) -> str:
    if hasattr(model, "peft_config"):
        return "as peft sets it for everything that exists when get_peft_model is called"
    if any(p.requires_grad for p in model.parameters()):
        return "by requires_grad_(False) on the tower"
    return "by requires_grad_(False) or prepare_model_for_kbit_training on the model"
