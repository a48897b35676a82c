"""A multimodal LLM from a pretrained tower and a pretrained language model, with a new projector between them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from covft.adapters.registry import describe
from covft.data.placeholders import ImageText
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.building.loading import class_of, load_language_model, load_tower, whole_weights

# Towers that take pictures of any size by themselves; all others only those of their config.
_ANY_SIZE = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit"})
_INTERNVL_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


@whole_weights()
def build_llava(
    vision: Any,
    language: Any,
    tokenizer: Any,
    *,
    feature_layer: int = -2,
    image_size: int | None = None,
    image_token: str = "<image>",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """LLaVA from its parts: tower, two new linear layers, language model.

    The tokenizer learns the image token and gets a padding token if it has none; the embeddings grow with it, new rows
    being the mean of the others. Of a tower with a class token the class token is dropped, as in LLaVA
    (`vision_feature_select_strategy="default"`); a tower without one, such as SigLIP, keeps all its tokens (`"full"`).
    DINOv3 has registers behind its class token; LLaVA drops the first token alone, so the language model reads the
    registers as four more tokens.

    Args:
        vision: Id or folder of a tower (CLIP, SigLIP, DINOv2, DINOv3, InternViT, ...), or the loaded tower.
        language: Id or folder of a language model (Llama and Vicuna, Phi-3, Qwen2, SmolLM2, ...), or the loaded model.
        tokenizer: The tokenizer of the language model; changed in place.
        feature_layer: Which of the tower's hidden states the language model sees.
        image_size: Height and width of the pictures, in pixels; None takes that of the tower's config. Only DINOv2 and
            DINOv3 can do with another.
        image_token: What stands for an image in the text.
        dtype: Of all weights; None takes that of the language model.
        attn_implementation: For parts that are loaded here: `"sdpa"`, `"flash_attention_2"`, ...

    Returns:
        A `LlavaForConditionalGeneration` in eval mode. Saved by `save_pretrained`, it loads like any other.

    Raises:
        UnknownViTError: If the tower cannot be had.
        UnsupportedViTError: If it is no tower for LLaVA.
        ConfigError: If the language model or a setting cannot work.

    Example:
        >>> tokenizer = AutoTokenizer.from_pretrained("lmsys/vicuna-7b-v1.5")
        >>> model = build_llava("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5", tokenizer)
        >>> model.config.image_seq_length
        576
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tower, llm = _load(vision, language, dtype, attn_implementation)
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


@whole_weights()
def build_internvl(
    vision: Any,
    language: Any,
    tokenizer: Any,
    *,
    feature_layer: int = -1,
    downsample_ratio: float = 0.5,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """InternVL from its parts: InternViT, pixel shuffle and a new projector, language model.

    The tokenizer learns `<img>`, `<IMG_CONTEXT>` and `</img>`; otherwise as `build_llava`.

    Args:
        vision: Id or folder of an InternViT, in transformers' layout or in OpenGVLab's own (such as
            `OpenGVLab/InternViT-300M-448px`), or the loaded tower.
        language: Id or folder of a language model, or the loaded model.
        tokenizer: The tokenizer of the language model; changed in place.
        feature_layer: Which of the tower's hidden states the language model sees.
        downsample_ratio: By which each side of the grid of tokens shrinks; 0.5 makes 256 of 1024.
        dtype: Of all weights; None takes that of the language model.
        attn_implementation: For parts that are loaded here: `"sdpa"`, `"flash_attention_2"`, ...

    Returns:
        An `InternVLForConditionalGeneration` in eval mode.

    Raises:
        UnknownViTError: If the tower cannot be had.
        UnsupportedViTError: If it is no InternViT.
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
            "InternVL in transformers is made for InternViT alone.",
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


def freeze_unread(model: Any) -> list[str]:
    """Freeze what of the tower no loss depends on: all behind the hidden state that is read, and mask tokens.

    DDP waits for the gradient of everything that is trained; with LLaVA's penultimate layer, one that trains the whole
    tower would wait for the last block's for ever.

    Args:
        model: A LLaVA or InternVL.

    Returns:
        The names of these parameters, in the tower.
    """
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    blocks = describe(tower).blocks
    read = max(
        layer if layer >= 0 else len(blocks) + 1 + layer for layer in ([layers] if isinstance(layers, int) else layers)
    )
    first = f"{blocks[read].path}." if read < len(blocks) else None
    names, behind = [], False
    for name, parameter in tower.named_parameters():
        # Towers register their modules in the order in which they run.
        behind = behind or (first is not None and name.startswith(first))
        if behind or name.endswith("mask_token"):
            parameter.requires_grad_(False)
            names.append(name)
    return names


def image_text_of(model: Any, tokenizer: Any) -> ImageText:
    """What stands for an image in the text of a LLaVA or InternVL; for `covft.data.ConversationDataset`.

    Args:
        model: The model, or one like it that was loaded.
        tokenizer: Its tokenizer.
    """
    config = model.config
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    around = ("<img>", "</img>") if config.model_type == "internvl" else ("", "")
    return ImageText(token, per_tile=config.image_seq_length, before=around[0], after=around[1])


def llava_processor(model: Any, tokenizer: Any, image_processor: Any) -> Any:
    """The processor of a LLaVA, which puts as many placeholders into a prompt as the model makes tokens of an image.

    Args:
        model: What `build_llava` returned.
        tokenizer: Its tokenizer; the chat template comes from it.
        image_processor: `load_image_processor(vision, image_size)`.
    """
    from transformers import LlavaProcessor

    prefix, _ = _count_tokens(model.model.vision_tower, None)
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=_first(model.config.vision_config.patch_size),
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=tokenizer.convert_ids_to_tokens(model.config.image_token_id),
        num_additional_image_tokens=prefix,
    )


# ---------------------------------------------------------------------------------------- steps


def _load(vision: Any, language: Any, dtype: torch.dtype | None, attn_implementation: str | None) -> tuple[Any, Any]:
    """Both parts, whole, of the classes that the config of the whole will ask for."""
    tower = load_tower(vision, dtype=dtype, attn_implementation=attn_implementation)
    llm = load_language_model(language, dtype=dtype, attn_implementation=attn_implementation)
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
                expected="whole weights; they are shared out where training begins",
                got=f"a {type(part).__name__} on the meta device or partitioned by ZeRO-3",
                fix=f"{name}=its id or folder, or load it in `with whole_weights():`",
            )
    return tower.to(llm.device, dtype or llm.dtype), llm.to(dtype or llm.dtype)


def _check_layer(tower: nn.Module, feature_layer: int) -> None:
    depth = describe(tower).depth
    if not -depth - 1 <= feature_layer <= depth:
        raise ConfigError(
            f"feature_layer={feature_layer} is no hidden state of this tower.",
            expected=f"an index in [{-depth - 1}, {depth}]",
            got=feature_layer,
            fix="feature_layer=-2",
        )


def _count_tokens(tower: nn.Module, image_size: int | None) -> tuple[int, int]:
    """Tokens before the patches, and patches of a picture."""
    config: Any = tower.config
    kind, own, patch = getattr(config, "model_type", None), getattr(config, "image_size", None), config.patch_size
    own, patch = _first(own), _first(patch)
    size = own if image_size is None else image_size
    prefix = describe(tower).input.prefix_tokens
    if prefix is None or own is None:
        raise UnsupportedViTError(
            f"How many tokens a {type(tower).__name__} makes of an image is not known.",
            expected="CLIP, SigLIP, DINOv2, DINOv3, ViT or InternViT",
            got=type(tower).__name__,
        )
    if size != own and (kind not in _ANY_SIZE or size % patch):
        raise ConfigError(
            f"This {type(tower).__name__} takes no pictures of {size} x {size} pixels.",
            expected=f"a multiple of {patch}" if kind in _ANY_SIZE else f"{own}, by its config",
            got=size,
            fix=f"image_size={max(size // patch, 1) * patch if kind in _ANY_SIZE else own}",
        )
    return prefix, (size // patch) ** 2


def _prepare_tokens(tokenizer: Any, llm: Any, tokens: tuple[str, ...]) -> None:
    """Teach the tokenizer, and grow the embeddings by as many rows as it has more than they."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError("The tokenizer has no token to pad with.", fix='tokenizer.pad_token = "..."')
    rows = llm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    # A multiple of 64, as the matrix units of GPUs like it.
    llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for table in {
            id(t): t for t in (llm.get_input_embeddings().weight, llm.get_output_embeddings().weight)
        }.values():
            table[rows:] = table[:rows].float().mean(dim=0).to(table.dtype)


def _join(kind: Any, config: Any, tower: Any, projector: nn.Module, llm: Any, tokenizer: Any) -> Any:
    """The model of a config, made without weights, around parts that have theirs."""
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
