"""Builds a multimodal LLM from a pretrained tower and a pretrained language model, with a new projector."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from covft.adapters.huggingface import class_of
from covft.adapters.registry import describe
from covft.adapters.sources import load_vit
from covft.data.chat_template import Tokenizer
from covft.data.placeholders import ImageText
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.building.loading import load_language_model, whole_weights
from covft.integrations.building.pooling import FIELD
from covft.integrations.mllm.families import base_of
from covft.utils.arguments import check_kinds

# Towers that take images of any size; all others take only that of their config.
_ANY_SIZE = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit"})
TOWER = "covft_vit"  # model type of `covft.integrations.building.tower.ViTTower`
_INTERNVL_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


@check_kinds
@whole_weights()
def build_llava(
    vision: str | os.PathLike[str] | nn.Module,
    language: str | os.PathLike[str] | nn.Module,
    tokenizer: Tokenizer,
    *,
    feature_layer: int = -2,
    image_size: int | None = None,
    image_token: str = "<image>",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """Build a LLaVA from its parts: tower, two new linear layers, language model.

    The tokenizer gets the image token, and a padding token if it has none; new rows of the embeddings are the mean of
    the others. The class token of the tower is dropped, as in LLaVA (`vision_feature_select_strategy="default"`); a
    tower without one, such as SigLIP, keeps all its tokens (`"full"`). DINOv3 has four registers after its class token;
    LLaVA drops only the first token, so the language model reads the registers too.

    Args:
        vision: Id or folder of a tower (CLIP, SigLIP, DINOv2, DINOv3, InternViT, ...), `"timm:NAME"` or
            `"open_clip:NAME/TAG"`, or the loaded tower. A ViT of timm or open_clip becomes a `ViTTower`, whose hidden
            states are the patches alone.
        language: Id or folder of a language model (Llama and Vicuna, Phi-3, Qwen2, SmolLM2, ...), or the loaded model.
        tokenizer: The tokenizer of the language model; changed in place.
        feature_layer: Index of the hidden state of the tower that the projector reads.
        image_size: Height and width of the images, in pixels; None takes that of the tower's config. Only DINOv2,
            DINOv3, and ViTs of timm and open_clip by name support another.
        image_token: The placeholder of an image in the text.
        dtype: Of all weights; None takes that of the language model.
        attn_implementation: Of the parts that are loaded here: `"sdpa"`, `"flash_attention_2"`, ...

    Returns:
        A `LlavaForConditionalGeneration` in eval mode, which `save_pretrained` and `from_pretrained` treat like any
        other.

    Raises:
        UnknownViTError: If the tower cannot be loaded.
        UnsupportedViTError: If LLaVA cannot use it, or one of its weights is missing.
        ConfigError: If the language model or a setting cannot work.

    Example:
        >>> tokenizer = AutoTokenizer.from_pretrained("lmsys/vicuna-7b-v1.5")
        >>> model = build_llava("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5", tokenizer)
        >>> model.config.image_seq_length
        576
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tower, llm = _load(vision, language, dtype, attn_implementation, image_size)
    _check_states(tower)
    _check_layer(tower, feature_layer)
    prefix, patches = _count_tokens(tower, image_size)
    _prepare_tokens(tokenizer, llm, (image_token,))
    config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(llm.config),
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        image_seq_length=patches + max(prefix - 1, 0),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if prefix else "full",
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    return _join(LlavaForConditionalGeneration, config, tower, LlavaMultiModalProjector(config), llm, tokenizer)


@check_kinds
@whole_weights()
def build_internvl(
    vision: str | os.PathLike[str] | nn.Module,
    language: str | os.PathLike[str] | nn.Module,
    tokenizer: Tokenizer,
    *,
    feature_layer: int = -1,
    downsample_ratio: float = 0.5,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """Build an InternVL from its parts: InternViT, pixel shuffle and a new projector, language model.

    The tokenizer gets `<img>`, `<IMG_CONTEXT>` and `</img>`; otherwise like `build_llava`.

    Args:
        vision: Id or folder of an InternViT, in transformers' layout or in OpenGVLab's own (such as
            `OpenGVLab/InternViT-300M-448px`), or the loaded tower.
        language: Id or folder of a language model, or the loaded model.
        tokenizer: The tokenizer of the language model; changed in place.
        feature_layer: Index of the hidden state of the tower that the projector reads.
        downsample_ratio: Scale of each side of the token grid; 0.5 turns 1024 tokens into 256.
        dtype: Of all weights; None takes that of the language model.
        attn_implementation: Of the parts that are loaded here: `"sdpa"`, `"flash_attention_2"`, ...

    Returns:
        An `InternVLForConditionalGeneration` in eval mode.

    Raises:
        UnknownViTError: If the tower cannot be loaded.
        UnsupportedViTError: If it is not an InternViT.
        CheckpointError: If its weights are not those of its config.
        ConfigError: If the language model or a setting cannot work.

    Example:
        >>> tokenizer = AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct")
        >>> model = build_internvl("OpenGVLab/InternViT-300M-448px", "microsoft/Phi-3-mini-4k-instruct", tokenizer)
        >>> model.config.image_seq_length
        256
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionModel
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    tower, llm = _load(vision, language, dtype, attn_implementation)
    if not isinstance(tower, InternVLVisionModel):
        raise UnsupportedViTError(
            "InternVL in transformers supports only InternViT.",
            expected="InternVLVisionModel",
            got=type(tower).__name__,
            fix="build_llava(vision, language, tokenizer)",
        )
    _check_layer(tower, feature_layer)
    _, patches = _count_tokens(tower, None)
    side, shrink = int(patches**0.5), max(round(1 / downsample_ratio), 1)
    if side % shrink or downsample_ratio * shrink != 1:
        raise ConfigError(
            f"downsample_ratio={downsample_ratio} does not divide a grid of {side} x {side} tokens.",
            expected="1 / n with n a divisor of the grid's side",
            got=downsample_ratio,
            fix="downsample_ratio=0.5",
        )
    _prepare_tokens(tokenizer, llm, _INTERNVL_TOKENS)
    config = InternVLConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(llm.config),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(side // shrink) ** 2,
        downsample_ratio=downsample_ratio,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    return _join(InternVLForConditionalGeneration, config, tower, InternVLMultiModalProjector(config), llm, tokenizer)


@check_kinds
def image_text_of(model: nn.Module, tokenizer: Tokenizer) -> ImageText:
    """Return the placeholders of an image in the text of a LLaVA or InternVL; for `covft.data.ConversationDataset`.

    Args:
        model: The model, built here or loaded.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: If the model is neither.
    """
    config = _config_of(model, "image_token_id", "image_seq_length")
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    around = ("<img>", "</img>") if config.model_type == "internvl" else ("", "")
    return ImageText(token, per_tile=config.image_seq_length, before=around[0], after=around[1])


@check_kinds
def llava_processor(model: nn.Module, tokenizer: Tokenizer, image_processor: Callable[..., Any]) -> Any:
    """Build the processor of a LLaVA, which expands the placeholder of an image to one per image token.

    Args:
        model: A model from `build_llava`.
        tokenizer: Its tokenizer, with the chat template.
        image_processor: `load_image_processor(vision, image_size)`.

    Raises:
        ConfigError: If the model is not a LLaVA, or transformers refuses one of the others.
    """
    from transformers import LlavaProcessor

    config = _config_of(model, "image_token_id", "vision_feature_select_strategy")
    prefix, _ = _count_tokens(base_of(model).vision_tower, None)
    try:
        return LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=_first(config.vision_config.patch_size) * getattr(config, FIELD, 1),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=tokenizer.chat_template,
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            num_additional_image_tokens=prefix,
        )
    except TypeError as error:
        got = str(error).partition("\n")[0]
        raise ConfigError("A processor cannot be built of these.", expected="parts of transformers", got=got) from error


# ---------------------------------------------------------------------------------------- steps


def _config_of(model: Any, *needed: str) -> Any:
    """Return the config of a multimodal LLM; refuse another model."""
    config = getattr(model, "config", None)
    missing = [name for name in needed if not hasattr(config, name)]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} is not a multimodal LLM of this kind.",
            expected="a LLaVA or an InternVL of transformers",
            got=f"a config without {', '.join(missing)}" if config else "a model without a config",
        )
    return config


def _load(
    vision: Any,
    language: Any,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    image_size: int | None = None,
) -> tuple[Any, Any]:
    """Load both parts, and check that a saved model would load with their classes."""
    options: Any = {"dtype": dtype, "attn_implementation": attn_implementation}
    tower: Any = _load_tower(vision, image_size, options)
    llm = load_language_model(language, **options)
    for name, part, inner in (("vision", tower, tower), ("language", llm, llm.base_model)):
        wanted = class_of(part.config)
        if type(inner) is not wanted:
            raise UnsupportedViTError(
                f"A saved model would not load with this {type(inner).__name__} as its {name} part.",
                expected=getattr(wanted, "__name__", "a model of transformers"),
                got=type(inner).__name__,
            )
        if any(p.is_meta or hasattr(p, "ds_id") for p in part.parameters()):
            raise ConfigError(
                f"The weights of {name} are not all on this process.",
                expected="complete weights; they are sharded when training starts",
                got=f"a {type(part).__name__} on the meta device or partitioned by ZeRO-3",
                fix=f"{name}=its id or folder, or load it in `with whole_weights():`",
            )
    return tower.to(llm.device, dtype or llm.dtype), llm.to(dtype or llm.dtype)


def _load_tower(vision: Any, image_size: int | None, options: dict[str, Any]) -> nn.Module:
    """Load a tower; one of timm or open_clip becomes a `ViTTower`, one that LLaVA cannot call is refused."""
    from covft.integrations.building.tower import as_tower, is_source, vit_tower, with_image_size

    if is_source(vision):
        tower: Any = vit_tower(with_image_size(vision, image_size))
    else:
        tower = as_tower(vision if isinstance(vision, nn.Module) else load_vit(f"hf:{os.fspath(vision)}", **options))
    _, *others = inspect.signature(tower.forward).parameters.values()
    needed = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise UnsupportedViTError(
            f"{type(tower).__name__} cannot be the tower of a LLaVA, which passes it the images alone.",
            expected="a tower for images of one size",
            got=f"a tower that needs {', '.join(needed)} too",
            fix="the same ViT for one size, such as google/siglip2-so400m-patch14-384 instead of -naflex",
        )
    return tower


def _check_states(tower: Any) -> None:
    """Refuse a tower that LLaVA cannot ask for hidden states, such as InternViT before release 5 of transformers."""
    parameters = inspect.signature(tower.forward).parameters
    if "output_hidden_states" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise UnsupportedViTError(
            f"The {type(tower).__name__} of this transformers cannot be the tower of a LLaVA.",
            expected="a tower whose forward takes output_hidden_states",
            got=f"forward({', '.join(parameters)})",
            fix='pip install "transformers>=5.0", or covft.integrations.build_internvl for an InternViT',
        )


def _check_layer(tower: Any, feature_layer: int) -> None:
    depth, first = describe(tower).depth, 0
    if tower.config.model_type == TOWER:
        first = 1  # it has no state for the embeddings
    if not -depth - 1 + first <= feature_layer <= depth or (first and feature_layer == 0):
        raise ConfigError(
            f"feature_layer={feature_layer} is not a hidden state of this tower.",
            expected=f"an index in [{-depth - 1 + first}, {depth}]{' other than 0' if first else ''}",
            got=feature_layer,
            fix="feature_layer=-2",
        )


def _count_tokens(tower: nn.Module, image_size: int | None) -> tuple[int, int]:
    """Return the number of tokens before the patches, and of patches of an image."""
    config: Any = tower.config
    kind, own, patch = getattr(config, "model_type", None), getattr(config, "image_size", None), config.patch_size
    own, patch = _first(own), _first(patch)
    size = own if image_size is None else image_size
    prefix = 0 if kind == TOWER else describe(tower).input.prefix_tokens  # a ViTTower returns the patches alone
    if prefix is None or own is None:
        raise UnsupportedViTError(
            f"The number of tokens per image of a {type(tower).__name__} is unknown.",
            expected="CLIP, SigLIP, DINOv2, DINOv3, ViT or InternViT",
            got=type(tower).__name__,
        )
    if size != own and (kind not in _ANY_SIZE or size % patch):
        raise ConfigError(
            f"This {type(tower).__name__} does not take images of {size} x {size} pixels.",
            expected=f"a multiple of {patch}" if kind in _ANY_SIZE else f"{own}, by its config",
            got=size,
            fix=f"image_size={max(size // patch, 1) * patch if kind in _ANY_SIZE else own}",
        )
    return prefix, (size // patch) ** 2


def _prepare_tokens(tokenizer: Any, llm: Any, tokens: tuple[str, ...]) -> None:
    """Add tokens to the tokenizer, and rows for them to the embeddings."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError("The tokenizer has no token to pad with.", fix='tokenizer.pad_token = "..."')
    rows = llm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    # A multiple of 64 suits the matrix units of GPUs.
    llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for table in {
            id(t): t for t in (llm.get_input_embeddings().weight, llm.get_output_embeddings().weight)
        }.values():
            table[rows:] = table[:rows].float().mean(dim=0).to(table.dtype)


def _join(kind: Any, config: Any, tower: Any, projector: nn.Module, llm: Any, tokenizer: Any) -> Any:
    """Build the model of a config around parts that have their weights."""
    with torch.device("meta"):
        model = kind(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector.to(llm.device, llm.dtype)
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.config.vision_config, model.config.text_config = tower.config, llm.base_model.config
    model.tie_weights()
    model.generation_config = copy.deepcopy(llm.generation_config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value
