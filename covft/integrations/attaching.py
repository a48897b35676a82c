"""attach() and detach(): a context-aware tower inside a multimodal LLM, in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from covft.adapters.spec import Adapter
from covft.checkpoint import load
from covft.config import CoVFTConfig
from covft.encoder import ContextEncoder
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.attachment import Attachment, image_id
from covft.integrations.calls import CALLS, owned, stand_in, step_back
from covft.integrations.models import find_tower
from covft.integrations.prompt import PromptReader
from covft.unread import check_read
from covft.wrapping import DEFAULTS, Unset, unwrap, wrap

Model = TypeVar("Model", bound=nn.Module)
KEY = "_covft_attachment"


def attach(
    model: Model,
    text_encoder: Any = None,
    *,
    tokenizer: Any,
    layers: Iterable[int] | None = DEFAULTS["layers"],
    experts: int = DEFAULTS["experts"],
    routing: str = DEFAULTS["routing"],
    top_k: int = DEFAULTS["top_k"],
    context: str = DEFAULTS["context"],
    train_norms: str = DEFAULTS["train_norms"],
    activation: str = DEFAULTS["activation"],
    num_heads: int = DEFAULTS["num_heads"],
    expert_rank: int | None = DEFAULTS["expert_rank"],
    recompute: str = DEFAULTS["recompute"],
    feature_layer: int | None = DEFAULTS["feature_layer"],
    config: CoVFTConfig | None = None,
    adapter: Adapter | None = None,
    turns: str = "all",
    system: str | None = None,
    pretrained: str | Path | None = None,
) -> Model:
    """Make the tower of a multimodal LLM context-aware, in place.

    The tower stays where it is. `model(**batch)`, `model.generate(**inputs)`, `Trainer` and pipelines work as
    before: the instruction is read from the user's turns in `input_ids`, and reaches the right images. Both
    calls take `context_text=` besides, which overrides what would be read: a text for all images, or one per
    row of `input_ids`, or one per image. Nothing is read, or needed, where no image is encoded.

    Args:
        model: A multimodal LLM of transformers: LLaVA (Pixtral too), LLaVA-NeXT, LLaVA-OneVision, InternVL,
            PaliGemma, Gemma 3, Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-4V, Mistral 3,
            Mllama, or one that is built like them.
        text_encoder: As for `covft.wrap`.
        tokenizer: The model's tokenizer or processor, with its chat template; None if `context_text` is always
            given.
        layers: As for `covft.wrap`, and so are the next twelve.
        experts: Experts per adapted block.
        routing: How experts are weighted.
        top_k: Experts per image for sparse and random routing.
        context: What the router sees.
        train_norms: Which norms are trained.
        activation: Of the residual refinement.
        num_heads: Heads of the context attention.
        expert_rank: Rank of what experts differ by; None for whole experts.
        recompute: What backward computes again.
        feature_layer: Blocks behind this hidden state of the tower do not run. What the model reads is in
            `model.config.vision_feature_layer`; to leave out what it reads is refused.
        config: Settings to start from.
        adapter: How the tower is built, if no registered adapter knows it.
        turns: Which of several user turns make the instruction: `"all"`, joined by a space, `"first"`, `"last"`.
        system: The system prompt of your data. Needed only with templates that put it into the user's turn
            without a mark (Gemma 3, Mistral), where nothing else tells the two apart.
        pretrained: A folder that was saved, to start from instead of settings: what `model.save_pretrained`
            wrote to `covft/`, or a repository of the Hugging Face Hub.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a setting cannot work.
        UnsupportedViTError: If the model is attached already, or has no tower that can be served.
        CheckpointError: If `pretrained` does not fit.

    Example:
        >>> covft.attach(llava, "bert-base-uncased", tokenizer=processor)  # doctest: +SKIP
    """
    given = {name: value for name, value in locals().items() if name in DEFAULTS}
    given = {name: value for name, value in given.items() if not isinstance(value, Unset)}
    target = without_peft(model)
    if KEY in target.__dict__:
        raise UnsupportedViTError(
            "This model is attached already.",
            expected=f"a {type(target).__name__} as it was",
            fix="covft.attach(covft.detach(model), text_encoder, tokenizer=tokenizer)",
        )
    if pretrained is not None and (given or config is not None):
        raise ConfigError(
            "A saved tower has its settings with it.",
            expected="pretrained, or settings",
            got=f"pretrained and {', '.join(given) or 'config'}",
        )
    tower, family = find_tower(target, adapter)
    placeholder = image_id(target)
    reader = PromptReader(tokenizer, () if placeholder is None else (placeholder,), turns=turns, system=system)
    if pretrained is None:
        encoder = wrap(tower, text_encoder, config=config, adapter=adapter, **given)
    else:
        encoder = load(pretrained, tower, text_encoder)
    check_all_read_runs(encoder, getattr(target.config, "vision_feature_layer", None))
    # From here on nothing can fail.
    attachment = Attachment(target, encoder, reader, family)
    target.__dict__[KEY] = attachment
    stand_in(attachment)
    return model


def check_all_read_runs(encoder: ContextEncoder, read: Any) -> None:
    """Refuse a tower without blocks that the model reads; the ViT is as it was, then.

    Args:
        encoder: The wrapped tower.
        read: The hidden state that the model reads, or several; None for the last.

    Raises:
        ConfigError: If a block that it needs does not run.
    """
    layers = (-1,) if read is None else (read,) if isinstance(read, int) else tuple(read)
    try:
        check_read(encoder.spec, encoder.covft_config.feature_layer, layers)
    except ConfigError:
        unwrap(encoder)
        raise


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
    covered = [name for name in CALLS if hasattr(type(target), name) and owned(target, name) is None]
    if covered:
        raise UnsupportedViTError(
            f"Something else stands for model.{covered[0]} since attach().",
            expected="the methods that attach() put there",
            got=f"{type(target.__dict__.get(covered[0])).__name__} at {', '.join(covered)}",
            fix="accelerator.unwrap_model(model, keep_fp32_wrapper=False) first, if accelerate prepared it",
        )
    unwrap(encoder)
    step_back(target)
    del target.__dict__[KEY]
    return model


def get_encoder(model: nn.Module) -> ContextEncoder:
    """The context-aware tower of an attached model.

    Args:
        model: What was attached.

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


def attachment_of(model: nn.Module) -> Attachment | None:
    """What attach() left on a model; None if it is not attached.

    Args:
        model: A multimodal LLM, also inside a PeftModel.
    """
    return without_peft(model).__dict__.get(KEY)


def without_peft(model: nn.Module) -> Any:
    """The model inside a PeftModel, whose methods call those of the one inside.

    Args:
        model: Any model.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
