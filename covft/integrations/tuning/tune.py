"""tune(), untune() and merge(): one call for a ViT alone and for a whole multimodal LLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from covft.adapters.spec import Adapter
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.mllm.attach import attach, attach_planned, detach
from covft.integrations.mllm.attachment import attachment_of, image_id, without_peft
from covft.integrations.mllm.families import FAMILIES, base_of
from covft.integrations.tuning.beside import plan_beside, restore_outside
from covft.surgery.adapted import AdaptedViT
from covft.tuning import api
from covft.tuning.api import COVFT, as_method, plan_tune
from covft.tuning.method import Method
from covft.tuning.tuned import TunedViT
from covft.utils.arguments import check_kinds

_READING = {"turns": "all", "system": None, "empty_instruction": None}


@check_kinds
def tune(
    model: nn.Module,
    method: str | Method = COVFT,
    *,
    text_encoder: Any = None,
    tokenizer: Any = None,
    images: Any = None,
    language: str | Mapping[str, Any] | None = None,
    projector: bool | None = None,
    adapter: Adapter | None = None,
    **options: Any,
) -> Any:
    """Prepare a vision tower for tuning by one of many methods, in place: of a ViT alone, or inside a multimodal LLM.

    All of the tower that the method does not train is frozen. `covft.untune` restores the tower, bit for bit.

    Args:
        model: A vision transformer of timm, open_clip, transformers, or one that `adapter` knows; or a multimodal LLM
            of transformers, as for `covft.attach`.
        method: Name of a method, such as `"lora"` (`covft.tuning.methods()` lists them), or a method with its options.
            `"covft"` is `covft.wrap`, or `covft.attach` of a multimodal LLM.
        text_encoder: As for `covft.wrap`, for methods that need text; others ignore it.
        tokenizer: Of a multimodal LLM, as for `covft.attach`; methods without text need none.
        images: A tensor of images or an iterable of batches as the tower takes them, for methods that start from them,
            such as `"svpt"`; others ignore them.
        language: How the language model of a multimodal LLM is tuned: `"frozen"`, `"full"`, `"last_layers"`,
            `"top_layer"`, `"lora"`, `"dora"`, or a mapping such as `{"method": "lora", "r": 64}` (see
            `LanguageTuning`). None leaves it as it is.
        projector: Whether the projector of a multimodal LLM is trained; None leaves it as it is.
        adapter: How the ViT is built, if no registered adapter knows it.
        **options: Options of the method, such as `r=8`; for a multimodal LLM also `turns`, `system` and
            `empty_instruction`, as for `covft.attach`.

    Returns:
        Of a ViT, what is called as the ViT is: `tuned(images, text=None)`, with `save_pretrained`, `param_groups` and
        `vit`, the ViT, changed. Of a multimodal LLM, the model itself, or a `PeftModel` around it if its language model
        gets adapters; `covft.get_encoder(model)` is its tower.

    Raises:
        ConfigError: If the method or an option is not known, or a value cannot work.
        UnknownViTError: If no adapter knows the ViT.
        UnsupportedViTError: If the method cannot be used on this ViT, or if it is tuned or wrapped already.
        LayerIndexError: If an option asks for blocks that the ViT does not have, or that the model does not read.
        UnsupportedVersionError: If transformers is older than 4.57, for a multimodal LLM.

    Example:
        >>> import timm
        >>> tuned = tune(timm.create_model("test_vit"), "bitfit")
        >>> tuned(torch.rand(1, 3, 160, 160)).shape
        torch.Size([1, 1000])
    """
    if not is_mllm(model):
        given = {"tokenizer": tokenizer, "language": language, "projector": projector}
        if extra := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(extra)} belong to a multimodal LLM.",
                expected="a multimodal LLM of transformers, or a ViT without them",
                got=type(model).__name__,
            )
        return api.tune(model, method, text_encoder=text_encoder, images=images, adapter=adapter, **options)
    beside = None
    if language is not None or projector is not None:
        beside = plan_beside(model, language, projector)
    reading = {name: options.pop(name, default) for name, default in _READING.items()}
    if method == COVFT:
        attach(model, text_encoder, tokenizer=tokenizer, adapter=adapter, **reading, **options)
    else:
        chosen = as_method(method, options)
        if chosen.part == "projector" and projector is False:
            raise ConfigError(
                f"{chosen.name!r} trains experts of the projector.",
                expected="projector=True or None",
                got="projector=False",
            )
        attach_planned(
            model,
            lambda tower, read, connector: plan_tune(
                tower, chosen, text_encoder, adapter, read, images=images, connector=connector
            ),
            reading,
            tokenizer=tokenizer if chosen.needs_text else None,
            adapter=adapter,
        )
    if beside is None:
        return model
    attachment = attachment_of(model)
    assert attachment is not None, "attached above"
    try:
        return beside.install(model, attachment)
    except BaseException:
        untune(model)
        raise


@check_kinds
def untune(tuned: nn.Module) -> nn.Module:
    """Restore a tower as it was before `tune`, bit for bit, in place.

    Args:
        tuned: What `tune`, `wrap` or `attach` returned.

    Returns:
        The ViT; or the multimodal LLM, without a `PeftModel` that `tune` had put around it. What was trained outside
        the tower keeps its values.

    Raises:
        UnsupportedViTError: If it is not tuned, is restored already, or other code has changed what `tune` put there.
    """
    attachment = None if isinstance(tuned, TunedViT) else attachment_of(tuned)
    if attachment is None:
        return api.untune(tuned)
    detach(attachment.model)
    restore_outside(attachment)
    return attachment.model if attachment.linears else tuned


@check_kinds
def merge(tuned: nn.Module) -> nn.Module:
    """Fold what was trained of a tower into its weights, exactly, in place: the plain model, for any loader.

    `covft.merge` is this for methods that add the same to every input; it also merges mixtures of experts, with data.

    Args:
        tuned: What `tune` returned.

    Returns:
        The ViT, or the multimodal LLM with its plain tower; adapters of its language model stay.

    Raises:
        MergeError: If what the method adds depends on the input, as for covft and the methods that read text.
        UnsupportedViTError: If it is not tuned.
    """
    attachment = None if isinstance(tuned, TunedViT) else attachment_of(tuned)
    encoder = tuned if attachment is None else attachment.encoder
    if not isinstance(encoder, AdaptedViT):
        raise UnsupportedViTError(f"{type(tuned).__name__} is not tuned.", fix='covft.tune(vit, "lora")')
    if attachment is not None:
        attachment.check_uncovered("tune()")
    vit = encoder.merge()
    if attachment is None:
        return vit
    attachment.remove()
    return tuned


def is_mllm(model: nn.Module) -> bool:
    """Return whether a model is a multimodal LLM of transformers, and no vision tower.

    Args:
        model: A model, inside a PeftModel or not.
    """
    target = without_peft(model)
    if attachment_of(target) is not None:
        return True
    config: Any = getattr(target, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is not None and isinstance(getattr(base_of(target), family.tower, None), nn.Module):
        return True  # and not the tower alone, which has the same name in older releases of transformers
    return config is not None and image_id(target) is not None and hasattr(base_of(target), "get_image_features")
