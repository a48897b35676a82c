"""The parts that a multimodal LLM is assembled from: a vision tower, a language model, an image processor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from covft.errors import CheckpointError, ConfigError, CoVFTError, UnknownViTError, UnsupportedViTError
from covft.integrations.building.internvit import MODEL_TYPE, load_internvit
from covft.utils.sharding import unpartitioned

# Of published towers, what no multimodal LLM reads: heads that pool, and the token of masked pretraining.
_UNREAD = ("head.", "pooler.", "mask_token", "visual_projection.")
# What the outputs of a language model go through after its head; LLaVA's and InternVL's have only the head.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Have `from_pretrained` load all weights on every process while this is open.

    Under ZeRO-3 it gives each process a share of them, and under FSDP all but one process nothing: fine for a model
    that is trained as it was saved, but parts have to be read to be joined, and embeddings to grow. The whole is
    still shared out where training begins.
    """
    efficient = os.environ.get(_EFFICIENT)
    if efficient is not None:
        os.environ[_EFFICIENT] = "false"
    try:
        with unpartitioned():
            yield
    finally:
        if efficient is not None:
            os.environ[_EFFICIENT] = efficient


def load_tower(source: Any, *, dtype: torch.dtype | None = None, attn_implementation: str | None = None) -> Any:
    """A vision tower of transformers with its pretrained weights.

    Args:
        source: An id or folder: of a vision model, of a pair such as CLIP or SigLIP (of which the vision model is
            taken), or of InternViT in OpenGVLab's own layout. A model that is loaded already is returned as it is.
        dtype: Of the weights; None leaves them as they are saved.
        attn_implementation: Such as `"sdpa"` or `"flash_attention_2"`; None leaves the choice to transformers.

    Raises:
        UnknownViTError: If it cannot be fetched or is no vision model.
        UnsupportedViTError: If it has other weights than a vision model of its kind.
    """
    if isinstance(source, nn.Module):
        return source
    name, options = os.fspath(source), _options(dtype, attn_implementation)
    with _reported(UnknownViTError, "vision tower", name):
        config = _tower_config(name)
        if isinstance(config, dict):
            return load_internvit(name, config, dtype=dtype, attn_implementation=attn_implementation)
        kind = class_of(config)
        if kind is None or kind.main_input_name != "pixel_values":
            raise UnknownViTError(
                f"{name} has no vision model that transformers can build alone.",
                expected="CLIP, SigLIP, DINOv2, DINOv3, InternViT, or another vision transformer",
                got=type(config).__name__,
            )
        with _quiet():  # the other half of a pair is not missed, and what is missing is looked at below
            model, info = kind.from_pretrained(name, output_loading_info=True, **options)
    missing = [key for key in sorted(info["missing_keys"]) if not any(part in key for part in _UNREAD)]
    if missing:
        raise UnsupportedViTError(
            f"The weights of {name} are not those of a {kind.__name__}.",
            expected="all of its tensors",
            got=f"without {', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}",
            fix="load the whole model and pass its tower",
        )
    return model


def load_language_model(
    source: Any, *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> Any:
    """A causal language model of transformers with its pretrained weights, checked for a place behind a tower.

    Args:
        source: An id or folder; a model that is loaded already is checked and returned.
        dtype: Of the weights; None leaves them as they are saved.
        attn_implementation: Such as `"sdpa"` or `"flash_attention_2"`; None leaves the choice to transformers.

    Raises:
        ConfigError: If it cannot be fetched, or its outputs are more than its head makes of its states.
        CheckpointError: If a weight is missing.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(source, nn.Module):
        model: Any = source
    else:
        name, options = os.fspath(source), _options(dtype, attn_implementation)
        with _reported(ConfigError, "language model", name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
        model, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{name} lacks weights of a {type(model).__name__}.",
                expected="all of its tensors",
                got=f"without {', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}",
            )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} is no language model with a head.",
            expected="a causal language model, such as LlamaForCausalLM",
            got=type(model).__name__,
            fix="AutoModelForCausalLM.from_pretrained(...)",
        )
    more = [key for key in _AFTER_THE_HEAD if getattr(model.config, key, None) not in (None, 1, 1.0)]
    more += ["a bias of the head"] if head.bias is not None else []
    if more:
        raise ConfigError(
            f"The outputs of {type(model).__name__} are more than its head makes of its states.",
            expected="a language model such as Llama, Qwen2 or Phi-3",
            got=", ".join(more),
        )
    return model


def load_image_processor(source: Any, image_size: int | None = None) -> Any:
    """The image processor of a tower, for pictures of the size that the tower takes.

    Args:
        source: Id or folder of the tower.
        image_size: Height and width in pixels; None takes those of the tower's config, which for DINOv2 are not what
            its processor makes by itself.

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoImageProcessor

    name = os.fspath(source)
    with _reported(ConfigError, "image processor", name):
        processor = AutoImageProcessor.from_pretrained(name)
        if image_size is None:
            config = _tower_config(name)
            own = config.get("image_size") if isinstance(config, dict) else getattr(config, "image_size", None)
            image_size = own[0] if isinstance(own, (list, tuple)) else own
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        crops = getattr(processor, "do_center_crop", None) and getattr(processor, "crop_size", None) is not None
        processor.size = {"shortest_edge": image_size} if crops else square
        if crops:
            processor.crop_size = square
    return processor


def class_of(config: Any) -> Any:
    """The class that transformers builds for a config where only the config is known; None if there is none.

    Args:
        config: Of a tower, or of a language model (whose base model it is).
    """
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else None


def _tower_config(name: str) -> Any:
    """The config of a tower, or of the tower of a pair; a dict for InternViT in OpenGVLab's own layout."""
    from transformers import AutoConfig, PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(name)
    if values.get("model_type") == MODEL_TYPE:
        return values
    config = AutoConfig.from_pretrained(name)
    return getattr(config, "vision_config", None) or config


def _options(dtype: torch.dtype | None, attn_implementation: str | None) -> dict[str, Any]:
    given = {"dtype": dtype or "auto", "attn_implementation": attn_implementation}
    return {name: value for name, value in given.items() if value is not None}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _reported(kind: type[CoVFTError], what: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for models that cannot be had into an error that says what to do."""
    try:
        yield
    except CoVFTError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise kind(
            f"The {what} {name!r} cannot be loaded.",
            expected="an id or a folder of a model that this transformers knows",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            fix=f"`hf download {name}` where there is a network (then HF_HUB_OFFLINE=1), or a local folder",
        ) from error
