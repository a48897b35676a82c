"""attach() and detach(): a context-aware tower inside a multimodal LLM, in place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from typing_extensions import Unpack

from covft.adapters.spec import Adapter
from covft.checkpoints.loading import read_settings
from covft.checkpoints.pretrained import prefix_of
from covft.config import CoVFTConfig, Settings, show_settings
from covft.encoder import ContextEncoder
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.mllm import overrides
from covft.integrations.mllm.attachment import KEY, Attachment, attachment_of, image_id, read_layers, without_peft
from covft.integrations.mllm.families import find_connector, find_tower
from covft.integrations.mllm.prompt import PromptReader
from covft.surgery.packed import naming_tower
from covft.surgery.skipping import check_read
from covft.tuning import api
from covft.tuning.api import TunePlan
from covft.tuning.loading import SavedMethod
from covft.tuning.method import Method
from covft.utils.arguments import check_kinds
from covft.utils.transformers_names import check_release
from covft.wrapping import WrapPlan, plan_load, plan_wrap, unwrap

Model = TypeVar("Model", bound=nn.Module)


@check_kinds
@show_settings
def attach(
    model: Model,
    text_encoder: Any = None,
    *,
    tokenizer: Any,
    turns: str = "all",
    system: str | None = None,
    empty_instruction: str | None = None,
    pretrained: str | Path | None = None,
    config: CoVFTConfig | None = None,
    adapter: Adapter | None = None,
    **settings: Unpack[Settings],
) -> Model:
    """Make the tower of a multimodal LLM context-aware, in place.

    The tower stays where it is. `model(**batch)`, `model.generate(**inputs)`, `Trainer` and pipelines work as before:
    the instruction is read from the user's turns in `input_ids`, and reaches the right images. Both calls also take
    `context_text=`, which overrides what would be read: a text for all images, or one per row of `input_ids`, or one
    per image. Nothing is read, or needed, where no image is encoded.

    Args:
        model: A multimodal LLM of transformers: LLaVA (Pixtral too), LLaVA-NeXT, LLaVA-OneVision, InternVL, PaliGemma,
            Gemma 3, Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-4V, Mistral 3, Mllama, or one that
            is built like them.
        text_encoder: As for `covft.wrap`.
        tokenizer: The model's tokenizer or processor, with its chat template; None if `context_text` is always given.
        turns: User turns that make the instruction: `"all"`, joined by a space, the `"first"` or the `"last"`.
        system: The system prompt of your data. Needed only with templates that put it into the user's turn without a
            mark (Gemma 3, Mistral), where nothing else tells the two apart.
        empty_instruction: Instruction of rows whose user says nothing; None makes such a row an error, or with
            `null_text=True` one without a text.
        pretrained: A saved folder to start from instead of settings: what `model.save_pretrained` wrote to `covft/`,
            or a repository of the Hugging Face Hub.
        config: Settings to start from.
        adapter: How the tower is built, if no registered adapter knows it.
        **settings: Fields of `CoVFTConfig`, as for `covft.wrap`. What the model reads
            (`model.config.vision_feature_layer`) limits them: `layers` after it, which nothing would train, and a
            `feature_layer` that would skip it are refused.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a setting cannot work.
        UnsupportedViTError: If the model is attached already, or has no tower that covft can wrap.
        CheckpointError: If `pretrained` does not fit.
        UnsupportedVersionError: If transformers is older than 4.57.

    Example:
        >>> covft.attach(llava, "bert-base-uncased", tokenizer=processor)  # doctest: +SKIP
    """
    reading = {"turns": turns, "system": system, "empty_instruction": empty_instruction}

    def plan_of(tower: nn.Module, read: Any, connector: Mapping[str, nn.Module]) -> WrapPlan | TunePlan:
        plan = plan_tower(tower, text_encoder, read, pretrained, config, adapter, settings, connector=connector)
        if pretrained is not None and tokenizer is not None:
            _warn_of_reading(pretrained, reading)
        return plan

    return attach_planned(model, plan_of, reading, tokenizer=tokenizer, adapter=adapter)


def _warn_of_reading(pretrained: str | Path, reading: Mapping[str, Any]) -> None:
    """Warn if prompts were read by other settings in training."""
    saved = read_settings(pretrained)[1].get("reading") or {}
    other = [name for name in saved if name in reading and saved[name] != reading[name]]
    if other:
        trained = ", ".join(f"{name}={saved[name]!r}" for name in other)
        warnings.warn(
            f"The tower in {pretrained} was trained on text that was read from prompts with {trained}; here it is "
            f"{', '.join(f'{name}={reading[name]!r}' for name in other)}. covft.load_model takes the settings of "
            "training.",
            UserWarning,
            stacklevel=5,
        )


def attach_planned(
    model: Model,
    plan_of: Callable[[nn.Module, Any, Mapping[str, nn.Module]], WrapPlan | TunePlan],
    reading: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    adapter: Adapter | None = None,
) -> Model:
    """Change the tower of a multimodal LLM as planned, and give it its text in every call of the model.

    Args:
        model: A multimodal LLM of transformers.
        plan_of: Plans the change of a tower, of which the model reads a hidden state, or several, through a connector.
        reading: `turns`, `system` and `empty_instruction`, as for `attach`.
        tokenizer: As for `attach`.
        adapter: As for `attach`.

    Returns:
        The model itself.

    Raises:
        CoVFTError: As `attach` does; nothing is changed then.
    """
    if "transformers" in sys.modules:  # else `find_tower` refuses the model
        check_release("attach()")
    # Look
    target = unattached(model)
    tower, family = find_tower(target, adapter)
    placeholder = image_id(target)
    # Plan
    reader = PromptReader(tokenizer, () if placeholder is None else (placeholder,), **reading)
    with naming_tower(prefix_of(tower, target).rstrip(".")):
        plan = plan_of(tower, read_layers(target), find_connector(target))
    # Install
    encoder = plan.install()
    reader.has_null_text = plan.null_text
    encoder.reading = None if reader.tokenizer is None else reader.settings
    attachment = Attachment(target, encoder, reader, family)
    target.__dict__[KEY] = attachment
    overrides.install(attachment)
    return model


def plan_tower(
    tower: nn.Module,
    text_encoder: Any,
    read: Any,
    pretrained: str | Path | None,
    config: CoVFTConfig | None,
    adapter: Adapter | None,
    settings: Mapping[str, Any],
    method: str | Method = api.COVFT,
    connector: Mapping[str, nn.Module] | None = None,
) -> WrapPlan | TunePlan:
    """Check how a tower is going to be wrapped, or tuned if that was saved; nothing of it is changed.

    Args:
        tower: The ViT of a multimodal LLM.
        text_encoder: As for `attach`.
        read: The hidden state that the model reads, or several; None for the last.
        pretrained: As for `attach`.
        config: As for `attach`.
        adapter: As for `attach`.
        settings: As for `attach`, or the options of the method.
        method: How the tower is tuned.
        connector: What is between tower and language model, by path; None if that is not known.

    Raises:
        CoVFTError: As `attach` does.
    """
    if method != api.COVFT and pretrained is None:
        chosen = api.as_method(method, dict(settings))
        return api.plan_tune(tower, chosen, text_encoder, adapter, read, connector=connector)
    if pretrained is None:
        plan = plan_wrap(tower, text_encoder, config, adapter, settings, read)  # type: ignore[arg-type]
    elif settings or config is not None or method != api.COVFT:
        other = "config" if config is not None else f"method={method!r}"
        raise ConfigError(
            "A saved tower has its own settings.",
            expected="pretrained, or settings",
            got=f"pretrained and {', '.join(settings) or other}",
        )
    elif (saved := SavedMethod.read(pretrained)) is not None:
        return api.plan_load(saved, tower, text_encoder, adapter, read, connector)
    else:
        plan = plan_load(pretrained, tower, text_encoder, adapter)
        check_read(plan.spec, plan.config.feature_layer, read)
    return plan


def unattached(model: nn.Module) -> Any:
    """Return the model itself, without a PeftModel around it.

    Args:
        model: What is going to be attached.

    Raises:
        UnsupportedViTError: If it is attached already.
    """
    target = without_peft(model)
    if attachment_of(target) is not None:
        raise UnsupportedViTError(
            "This model is attached already.",
            expected=f"a {type(target).__name__} as it was",
            fix="covft.attach(covft.detach(model), text_encoder, tokenizer=tokenizer)",
        )
    return target


@check_kinds
def detach(model: Model) -> Model:
    """Undo `attach`, in place: methods, FFNs, norms and names are as they were, bit for bit.

    Args:
        model: What was attached.

    Returns:
        The model itself. What was trained outside the tower keeps its values.

    Raises:
        UnsupportedViTError: If the model is not attached, or another library has wrapped one of its methods since.
    """
    target = without_peft(model)
    encoder = get_encoder(target)
    attachment = target.__dict__[KEY]
    attachment.check_uncovered("attach()")
    if isinstance(encoder, ContextEncoder):
        unwrap(encoder)
    else:
        api.untune(encoder)
    attachment.remove()
    return model


@check_kinds
def get_encoder(model: nn.Module) -> Any:
    """Return the tower of an attached model: the `ContextEncoder`, or the `TunedViT` of another method.

    Args:
        model: What was attached, or tuned by `covft.tune`.

    Returns:
        The encoder; its `vit` is the tower, where it always was.

    Raises:
        UnsupportedViTError: If the model is not attached.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise UnsupportedViTError(
            f"This {type(model).__name__} is not attached.",
            fix="covft.attach(model, text_encoder, tokenizer=tokenizer)",
        )
    return attachment.encoder
