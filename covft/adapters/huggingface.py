"""Loads vision towers of transformers, and only with all the weights that their features depend on."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from covft.adapters.internvit import MODEL_TYPE, internvit_config, published_weights
from covft.errors import CheckpointError, UnknownViTError, UnsupportedViTError
from covft.utils.extras import import_library
from covft.utils.foreign_code import refuse_code
from covft.utils.transformers_names import from_config, loading_options

_HUB = ("revision", "cache_dir", "token", "subfolder")
_ALONE = "load the whole model and pass its tower: covft.wrap(model.model.vision_tower, ...)"
# Missing from many published towers, and not read by multimodal LLMs: pooling heads, the token of masked pretraining.
# A projection is missing only where `class_name` asks for a class that has one, and its output is what that is for.
_UNREAD = re.compile(r"(^|\.)(head|pooler|mask_token)(\.|$)")


def load_tower(name: str, pretrained: bool, device: torch.device, options: dict[str, Any]) -> nn.Module:
    """Build a vision model of transformers, as `covft.adapters.sources.load_vit` does.

    Raises:
        UnknownViTError: If it is not a vision model.
        UnsupportedViTError: If weights of the vision model are missing.
        CheckpointError: If the weights of a published InternViT are not those of its config.
    """
    transformers = import_library("transformers", "transformers", needed_by="This ViT")
    hub = {key: options.pop(key) for key in _HUB if key in options}
    options = {key: value for key, value in options.items() if value is not None}
    if options.pop("trust_remote_code", False):
        raise UnknownViTError(
            f"covft does not run the code of a repository, hf:{name}.",
            expected="a model that transformers itself has",
            got="trust_remote_code=True",
            fix="if you trust it, load it with transformers and pass the model",
        )
    class_name = options.pop("class_name", None)
    config, published = tower_config(name, **hub)
    kind = _model_class(transformers, class_name) if class_name else class_of(config)
    if kind is None or "input_ids" in inspect.signature(kind.forward).parameters:
        raise UnknownViTError(
            f"hf:{name} has no vision model that transformers can build alone.",
            expected="CLIP, SigLIP, DINOv2, DINOv3, InternViT or another vision model, or a model with a vision_config",
            got=class_name or type(config).__name__,
            fix=_ALONE,
        )
    if not pretrained:
        config.name_or_path = ""  # random weights are not those of this name
        with device:
            return from_config(kind, config, options)
    options = {**loading_options({"dtype": "auto", **options}), "output_loading_info": True}
    with quiet():  # the text half of a pair is unused, and missing weights are reported below
        if published:
            model, info = kind.from_pretrained(
                None, config=config, state_dict=published_weights(name, **hub), **options
            )
            model.config.name_or_path = name
        else:
            model, info = kind.from_pretrained(name, **hub, **options)
    lost = [key for key in sorted(info["missing_keys"]) if not _UNREAD.search(key)]
    lost += sorted(info["unexpected_keys"]) if published else []
    if lost:
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        raise (CheckpointError if published else UnsupportedViTError)(
            f"The weights of hf:{name} are not those of a {kind.__name__}.",
            expected=f"all {len(model.state_dict())} of its tensors",
            got=f"{'other names for' if published else 'without'} {', '.join(lost[:4])}{more}",
            fix=_ALONE,
        )
    return model.to(device)


def tower_config(name: str, **hub: Any) -> tuple[Any, bool]:
    """Return the config of a tower, or of the tower of a pair or MLLM.

    Args:
        name: Id or folder.
        **hub: Such as `revision`.

    Returns:
        The config of transformers, and whether the weights are in the layout of OpenGVLab's InternViT.

    Raises:
        CheckpointError: If it asks for code or weights of somewhere else.
    """
    transformers: Any = importlib.import_module("transformers")
    values, _ = transformers.PretrainedConfig.get_config_dict(name, **hub)
    refuse_code(values, name)
    if values.get("model_type") == MODEL_TYPE:
        return internvit_config(values), True
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    return getattr(config, "vision_config", None) or config, False


def _model_class(transformers: Any, name: Any) -> Any:
    """Return a model class of transformers itself by its name; None for all else, such as its automatic classes."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def class_of(config: Any) -> Any:
    """Return the class that transformers builds for a config, without a head; None if it has none."""
    mapping = importlib.import_module("transformers").MODEL_MAPPING
    return mapping[type(config)] if type(config) in mapping else None


def tower_source(vit: Any) -> tuple[str, dict[str, str]] | None:
    """Return the name that a vision model was loaded by, and the options that load it again; None if it has no name."""
    config = getattr(vit, "config", None)
    name = getattr(config, "name_or_path", None)
    if not name:
        return None
    default = class_of(config)
    is_default = default is not None and isinstance(vit, default)
    return name, {} if is_default else {"class_name": type(vit).__name__}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of transformers about weights, which the caller reports itself, while this is open."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
