"""Loads a saved multimodal LLM with its context-aware tower, attached."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from covft.adapters.huggingface import quiet
from covft.adapters.spec import Adapter
from covft.checkpoints.folder import read_config
from covft.checkpoints.loading import local_folder
from covft.checkpoints.pretrained import FOLDER, MARK
from covft.checkpoints.sources import is_hub_id, text_options
from covft.checkpoints.trained import load_trained
from covft.errors import CheckpointError, ConfigError, CoVFTError
from covft.integrations.building.pooling import restore_pooling
from covft.integrations.building.saving import merged
from covft.integrations.mllm.attach import attach
from covft.integrations.mllm.families import find_tower
from covft.integrations.mllm.prompt import PromptReader
from covft.integrations.training.parts import parts_of
from covft.surgery.wrapped import prefix_of
from covft.text import TextEncoder, as_text_encoder
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library
from covft.utils.foreign_code import refuse_code
from covft.utils.sources import with_options
from covft.utils.strict_json import read_strictly

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEXT_ENCODER = "text_encoder"  # sub-folder
# What is fetched of a repository: no code, and no pickles.
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
# Options of an adapter that name modules which peft imports.
_IMPORTED_BY_PEFT = ("megatron_config", "custom_modules", "_custom_modules")
# Where quantization configs list the modules that they leave alone.
_LEFT_ALONE = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


@check_kinds
def load_model(
    folder_or_repo_id: str | os.PathLike[str],
    text_encoder: Any = None,
    *,
    processor: Any = None,
    base: Any = None,
    merge_lora: bool = False,
    dtype: Any = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    adapter: Adapter | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a multimodal LLM that was saved after `attach`, with its tower attached.

    The folder is what `model.save_pretrained` wrote, or a checkpoint of a trainer: the model, its tokenizer or
    processor, and the adapted tower in `covft/`. The settings of `attach` that decide which text the tower sees
    (`turns`, `system`, ...) are those of training. No code of the folder runs.

    Args:
        folder_or_repo_id: The folder, or a repository of the Hugging Face Hub.
        text_encoder: As for `covft.wrap`; None takes the model in `text_encoder/` inside the folder, or builds it
            from the id that was saved.
        processor: Processor or tokenizer of the model; None loads that of the folder.
        base: The model that LoRA was trained on, where the folder holds only an adapter of peft: an id, a folder, or
            the loaded model, changed in place. None takes the id in the adapter's config.
        merge_lora: Whether to add LoRA to the weights and drop it.
        dtype: Of the weights; `"auto"` keeps that of the saved weights.
        device_map: As for `from_pretrained`. The language model may be offloaded, the tower may not.
        quantization_config: As for `from_pretrained`, for the language model: tower and projector are left as they are.
        attn_implementation: As for `from_pretrained`.
        adapter: How the tower is built, if no registered adapter knows it.
        trust_remote_code: As for `from_pretrained`: runs code of the folder. Never taken from a file.

    Returns:
        The model in eval mode, a `PeftModel` if LoRA is not merged; and its processor, or its tokenizer if the folder
        has no complete processor.

    Raises:
        CheckpointError: If the folder has no adapted tower, is incomplete or damaged, or names code to run.
        ConfigError: If processor or base cannot be loaded, or `device_map` offloads the tower.

    Example:
        >>> model, processor = load_model("runs/llava-covft")  # doctest: +SKIP
    """
    transformers = import_library("transformers", "transformers", needed_by="load_model")
    importlib.import_module("covft.integrations.building.tower")  # registers the towers of timm and open_clip
    folder = _folder_with_tower(folder_or_repo_id)
    tower = folder / FOLDER
    reading = _reading(tower)
    trust = {"trust_remote_code": trust_remote_code}
    is_adapter = (folder / _ADAPTER_CONFIG).is_file()
    source: Any = _base_of(folder, base) if is_adapter else folder
    if processor is None:
        processor = _processor_of(folder, source, trust)
    if isinstance(source, nn.Module):
        model: Any = source
    else:
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation, **trust}
        options = {name: value for name, value in options.items() if value is not None}
        model = _load_mllm(transformers, source, quantization_config, options)
        _check_tower_in_memory(model, adapter)
    restore_pooling(model)
    if text_encoder is None:
        text_encoder = _text_encoder_inside(folder, tower)
    tokenizer, settings = (None, {}) if reading is None else (processor, reading)
    in_tower = is_adapter and _adapts_tower(model, tower)
    if in_tower:  # whose names the adapted tower has
        model = _with_lora(model, folder)
    attach(model, text_encoder, tokenizer=tokenizer, pretrained=tower, adapter=adapter, **settings)
    if is_adapter:
        model = model if in_tower else _with_lora(model, folder)
        load_trained(model, tower)
        if merge_lora:
            model = merged(model)
    return model.eval(), processor


def _folder_with_tower(folder_or_repo_id: str | os.PathLike[str]) -> Path:
    """Return the folder, which is fetched if it is a repository."""
    expected = "a folder that an attached model was saved to, or a repository that can be reached"
    folder = local_folder(folder_or_repo_id, _FILES, expected)
    if not (folder / FOLDER).is_dir():
        raise CheckpointError(
            f"{folder} has no adapted tower.",
            expected=f"a folder with {FOLDER}/, which an attached model was saved to",
            got=", ".join(sorted(entry.name for entry in folder.iterdir())) if folder.is_dir() else "no such folder",
            fix="covft.attach(model, ...), then model.save_pretrained(folder); covft.load for a ViT alone",
        )
    return folder


def _reading(tower: Path) -> dict[str, Any] | None:
    """Return the settings by which `attach` read prompts in training; None if it read none."""
    config = read_config(tower)
    if "reading" not in config:
        warnings.warn(
            f"{tower} does not say how prompts were read in training; they are read as covft.attach does by default.",
            UserWarning,
            stacklevel=3,
        )
        return {}
    reading = config["reading"]
    if reading is None:
        return None
    parameters = inspect.signature(PromptReader).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    found = reading if isinstance(reading, dict) else {}
    wrong = [name for name, value in found.items() if name not in known or not isinstance(value, str | bool | None)]
    if wrong or found is not reading:
        raise CheckpointError(
            f"{tower} was written by a later version of covft, or is damaged.",
            expected=f"settings of the prompt reader: {', '.join(sorted(known))}",
            got=", ".join(map(str, wrong)) or type(reading).__name__,
            fix="upgrade covft",
        )
    return found


def _text_encoder_inside(folder: Path, tower: Path) -> TextEncoder | None:
    """Load the text encoder inside a folder, with the options that it had in training; None if there is none."""
    inside = folder / TEXT_ENCODER
    if not inside.is_dir():
        return None
    source = read_config(tower)["text"].get("source")
    encoder = as_text_encoder(with_options(os.fspath(inside), text_options(source)))
    if isinstance(source, str) and not source.startswith("features:"):
        encoder.name = source  # as in training, and when it is saved again
    return encoder


def load_processor(folder_or_repo_id: str | os.PathLike[str], base: Any = None) -> Any:
    """Load the processor that `load_model` returns, without the model.

    Args:
        folder_or_repo_id: As for `load_model`.
        base: As for `load_model`.

    Raises:
        CheckpointError: If the folder has no adapted tower.
        ConfigError: If neither a processor nor a tokenizer is found.
    """
    folder = _folder_with_tower(folder_or_repo_id)
    source = _base_of(folder, base) if (folder / _ADAPTER_CONFIG).is_file() else folder
    return _processor_of(folder, source, {"trust_remote_code": False})


def _processor_of(folder: Path, source: Any, trust: Mapping[str, bool]) -> Any:
    """Load the processor of a folder, or of the base model, or else a tokenizer."""
    transformers = import_library("transformers", "transformers", needed_by="load_model")
    names = [folder] if isinstance(source, nn.Module) or source is folder else [folder, source]
    processor = _load_processor(transformers, names, trust)
    if hasattr(processor, "image_seq_length") and not (folder / "processor_config.json").is_file():
        # Saved in parts, none of which says how many tokens a picture has, so that it has the default.
        length = read_strictly(folder / "config.json").get("image_seq_length") if source is folder else None
        processor.image_seq_length = length if isinstance(length, int) else processor.image_seq_length
    return processor


def _load_processor(transformers: Any, sources: list[Any], trust: Mapping[str, bool]) -> Any:
    """Load the processor of the first source that has one, or else its tokenizer."""
    problem = ""
    for source in sources:
        for kind in (transformers.AutoProcessor, transformers.AutoTokenizer):
            try:
                with quiet():
                    return kind.from_pretrained(source, **trust)
            except Exception as error:  # a processor fails in many ways where some of its files are missing
                problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    raise ConfigError(
        f"{sources[0]} has no processor and no tokenizer that can be loaded.",
        expected="the files that processor.save_pretrained(folder) writes",
        got=problem,
        fix="covft.load_model(folder, processor=processor)",
    )


def _load_mllm(transformers: Any, source: Any, quantization_config: Any, options: dict[str, Any]) -> Any:
    """Load a model with all its weights, or raise."""
    name, auto = os.fspath(source), transformers.AutoModelForImageTextToText
    try:
        values, _ = transformers.PretrainedConfig.get_config_dict(name)
        refuse_code(values, name)
        if quantization_config is not None:
            options["quantization_config"] = _sparing(auto, name, quantization_config, options["trust_remote_code"])
        with quiet():
            model, info = auto.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, CoVFTError):
            raise
        raise CheckpointError(
            f"The multimodal LLM in {name} cannot be loaded.",
            expected="config.json and safetensors of a model that transformers loads for image-text-to-text",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
        ) from error
    found = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(set(info["unexpected_keys"]) - {MARK}),
        "of another shape": sorted(map(str, info.get("mismatched_keys") or ())),
    }
    if any(found.values()):
        raise CheckpointError(
            f"The weights in {name} are not those of a {type(model).__name__}.",
            expected=f"all {len(model.state_dict())} of its tensors",
            got="; ".join(f"{what}: {', '.join(keys[:4])}" for what, keys in found.items() if keys),
            fix="copy the complete folder again",
        )
    return model


def _check_tower_in_memory(model: Any, adapter: Adapter | None) -> None:
    """Refuse a device map that offloads the tower: experts are copied from its weights."""
    tower = find_tower(model, adapter)[0]
    path = prefix_of(tower, model).rstrip(".")
    offloaded = next((name for name, parameter in tower.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise ConfigError(
            "device_map has offloaded the tower, whose weights the experts are copied from.",
            expected=f"{path} on a device; the language model may be offloaded",
            got=f"{path}.{offloaded} on the meta device",
            fix=f"device_map={{{path!r}: 0, ...}}, with the other parts of model.hf_device_map",
        )


def _sparing(auto: Any, name: str, quantization_config: Any, trust_remote_code: bool) -> Any:
    """Return a quantization config that leaves everything but the language model alone."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    result, kept = copy.deepcopy(quantization_config), _outside_the_language_model(model)
    for attribute in _LEFT_ALONE:
        if hasattr(result, attribute):
            setattr(result, attribute, [*(getattr(result, attribute) or ()), *kept])
            return result
    raise ConfigError(
        f"load_model does not know how {type(result).__name__} leaves modules alone, so it would quantise the tower.",
        expected=f"a quantization config with {' or '.join(_LEFT_ALONE)}",
        got=type(result).__name__,
        fix="transformers.BitsAndBytesConfig(load_in_4bit=True)",
    )


def _outside_the_language_model(model: Any) -> list[str]:
    """Return the names of the largest modules that have nothing of the language model, and of its head."""
    names: list[str] = []
    in_llm = {name for name, part in parts_of(model).items() if part == "llm"}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if module is head or (name and not inside and not any(p.startswith(f"{name}.") for p in in_llm)):
            names.append(name)
    return names


def _base_of(folder: Path, base: Any) -> Any:
    """Return the base model of an adapter: what the caller gives, or the id in the adapter's config."""
    config = _adapter_config(folder)
    if base is not None:
        return base
    named = config.get("base_model_name_or_path")
    named = named if isinstance(named, str) else ""
    inside = folder / named
    if named and inside.is_dir() and folder.resolve() in inside.resolve().parents:
        return inside
    if "/" not in named or not is_hub_id(named) or Path(named).exists():
        raise ConfigError(
            f"{folder} holds only an adapter, and does not name its base model by an id.",
            expected="the model that LoRA was trained on",
            got=repr(named),
            fix="covft.load_model(folder, base=...), an id, a folder or the loaded model",
        )
    return named


def _adapter_config(folder: Path) -> dict[str, Any]:
    """Read the config of an adapter, and refuse one that would run code."""
    path = folder / _ADAPTER_CONFIG
    try:
        config = read_strictly(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged.", expected="JSON", got=str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged.", expected="an object", got=type(config).__name__)
    refuse_code(config, str(path))
    imported = [name for name in _IMPORTED_BY_PEFT if config.get(name)]
    if imported:
        raise CheckpointError(
            f"{path} names modules to import.", expected="a config without them", got=", ".join(imported)
        )
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has the config of an adapter without its weights.",
            expected=_ADAPTER_WEIGHTS,
            got=", ".join(sorted(entry.name for entry in folder.iterdir())),
        )
    return config


def _adapts_tower(model: nn.Module, tower: Path) -> bool:
    """Return whether LoRA was in the tower too: its tensors were saved with it, and a plain tower has none of them."""
    extra = read_config(tower).get("extra") or ()
    return not set(extra) <= set(find_tower(model)[0].state_dict())


def _with_lora(model: nn.Module, folder: Path) -> Any:
    """Put the adapter of a folder into a model."""
    peft = import_library("peft", "train", needed_by="This adapter")
    return peft.PeftModel.from_pretrained(model, os.fspath(folder))
