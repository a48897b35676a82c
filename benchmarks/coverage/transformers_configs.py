"""Builds small configs from the real config classes of transformers: a rule per field name, and data for exceptions."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

WIDTH, HEADS, DEPTH, SIZE, PATCH = 64, 4, 4, 32, 8

# What a field becomes if it holds a number (or None, where the default config cannot be built).
_NUMBERS = {
    **dict.fromkeys(("hidden_size", "embed_dim", "width", "out_hidden_size", "vision_output_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), DEPTH
    ),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("projection_dim", "image_text_hidden_size", "d_model", "pooler_output_size"), WIDTH),
    **dict.fromkeys(("image_size", "crop_size", "pretrain_image_size"), SIZE),
    **dict.fromkeys(("text_hidden_size", "pred_hidden_size", "decoder_hidden_size", "output_channels"), WIDTH),
    **dict.fromkeys(("projection_intermediate_size", "decoder_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("pred_num_hidden_layers", "decoder_num_hidden_layers"), 1),
    **dict.fromkeys(("pred_num_attention_heads", "decoder_num_attention_heads"), HEADS),
    "patch_size": PATCH,
    "head_dim": WIDTH // HEADS,
    "num_position_embeddings": (SIZE // PATCH) ** 2,
    "num_patches": (SIZE // PATCH) ** 2,
    "vocab_size": 64,
    "fpn_hidden_size": WIDTH,
}
# Names of sub-configs that are shrunk by the same rules.
_SUB_CONFIGS = (
    "vision_config", "text_config", "qformer_config", "backbone_config", "sam_config", "encoder_config",
    "prompt_encoder_config", "mask_decoder_config", "audio_config", "video_config",
)  # fmt: skip


def small_config(config_class: Any, **overrides: Any) -> Any:
    """Return the config of a model that runs in milliseconds.

    Args:
        config_class: A config class of transformers.
        **overrides: Fields that count more than the rules; `name__field` is a field of the sub-config `name`.

    Returns:
        The config; what is not known by name has its default.
    """
    own = {name: value for name, value in overrides.items() if "__" not in name}
    default = _default(config_class)
    values: dict[str, Any] = {}
    for name, value in default.items():
        if name in own:
            continue
        if name in _SUB_CONFIGS and hasattr(value, "to_dict"):
            if "Timm" in type(value).__name__:
                continue  # a name of timm's, which has its own sizes
            prefix = f"{name}__"
            nested = {key.removeprefix(prefix): v for key, v in overrides.items() if key.startswith(prefix)}
            values[name] = small_config(type(value), **nested)
        elif (smaller := _smaller(name, value, default)) is not None:
            values[name] = smaller
    return config_class(**{**values, **own})


def _smaller(name: str, value: Any, default: dict[str, Any]) -> Any:
    """Return the value of a field; None if it keeps its default."""
    number = _NUMBERS.get(name)
    if isinstance(value, bool) or value is None:
        return None
    if name in ("image_size", "patch_size") and isinstance(value, list | tuple) and len(value) == 2:
        return type(value)(number for _ in value)
    if name == "depths" and isinstance(value, list | tuple):
        return type(value)([1] * len(value))
    if name == "embed_dim" and isinstance(default.get("num_heads"), list | tuple):
        return 16 * default["num_heads"][0]  # heads that grow from stage to stage
    return number if isinstance(value, int) and number is not None else None


def _default(config_class: Any) -> dict[str, Any]:
    """Return the fields of a default config, or of the class if that cannot be built."""
    try:
        config = config_class()
    except Exception:
        if not dataclasses.is_dataclass(config_class):
            return {}
        fields = dataclasses.fields(config_class)
        return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields if f.init}
    return {name: config.__dict__.get(name) for name in config.to_dict()}


def load_class(model: str, class_name: str, module: str | None = None) -> Any:
    """Return a class of transformers.

    Args:
        model: Its folder.
        class_name: Its name.
        module: The file that it is in, without `modeling_`; by default named as the folder.
    """
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{module or model}"), class_name)
