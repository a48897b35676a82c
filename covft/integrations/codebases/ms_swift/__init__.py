"""ms-swift: a tuner for `--external_plugins`, without edits to its files.

    COVFT_FLAGS="--covft_layers 11-22" swift sft --external_plugins .../ms_swift/covft_plugin.py --tuner_type covft ...

The plug-in has its own folder, because ms-swift adds the folder of a plug-in to the import path.
"""

from __future__ import annotations

import importlib
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from covft.checkpoints import saving
from covft.checkpoints.folder import check_trained_weights, compare_tensors
from covft.checkpoints.pretrained import FOLDER, prefix_of
from covft.errors import CheckpointError
from covft.integrations.codebases.conversations import template_of
from covft.integrations.codebases.launch import Flags, parse
from covft.integrations.codebases.patches import hold_text
from covft.integrations.mllm.attach import attach, get_encoder
from covft.integrations.mllm.attachment import attachment_of
from covft.integrations.training.checkpoints import trained_outside
from covft.utils.files import write_tensors

VARIABLE = "COVFT_FLAGS"
# transformers' Trainer looks for weights of this name when it resumes.
WEIGHTS = "model.safetensors"


def register() -> type:
    """Add the tuner `covft` to ms-swift, and hold the text where its templates run the tower.

    Returns:
        The tuner.
    """
    plugins = importlib.import_module("swift.tuner_plugin")
    methods = {"prepare_model": prepare_model, "save_pretrained": save_pretrained, "from_pretrained": from_pretrained}
    tuner = type("CovftTuner", (plugins.Tuner,), {name: staticmethod(method) for name, method in methods.items()})
    plugins.tuners_map["covft"] = tuner
    hold_text(importlib.import_module("swift.template").Template)
    return tuner


def prepare_model(args: Any, model: Any) -> nn.Module:
    """Attach a model and train its adapted tower, and the parts that ms-swift's flags leave unfrozen.

    Args:
        args: Arguments of ms-swift, with `freeze_llm` and `freeze_aligner`.
        model: A model that ms-swift has loaded.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a flag cannot work.
        UnsupportedViTError: If `covft.attach` cannot serve the model.
    """
    flags = _flags()
    model.requires_grad_(False)
    architecture: Any = model.model_meta.model_arch
    trained = [] if args.freeze_llm else [*architecture.language_model]
    trained += [] if args.freeze_aligner else architecture.aligner
    for prefix in trained:
        model.get_submodule(prefix).requires_grad_(True)
    attach(
        model,
        flags.text_encoder_for(flags.pretrained),
        tokenizer=_tokenizer(model, flags),
        pretrained=flags.pretrained,
        **flags.reading,
        **flags.settings,
    )
    if not (getattr(args, "deepspeed", None) or getattr(args, "fsdp", None)):  # which keep float32 copies themselves
        get_encoder(model).train_in_float32()
    return model


def save_pretrained(
    model: nn.Module,
    save_directory: str,
    state_dict: dict[str, Tensor] | None = None,
    safe_serialization: bool = True,
    **kwargs: Any,
) -> None:
    """Write the adapted tower to `covft/`, and the other trained tensors to `model.safetensors`.

    Args:
        model: A model that `prepare_model` returned.
        save_directory: Created if it does not exist.
        state_dict: Tensors of the model that another library has gathered.
        safe_serialization: Ignored: the weights are always safetensors.
        **kwargs: Ignored.

    Raises:
        CheckpointError: If weights are sharded (ZeRO-3).
    """
    attachment = attachment_of(model)
    assert attachment is not None, "attached by prepare_model"
    folder = Path(save_directory)
    encoder, gathered = attachment.encoder, dict(state_dict or {})
    prefix = prefix_of(encoder.vit, model)
    tower = {name.removeprefix(prefix): tensor for name, tensor in gathered.items() if name.startswith(prefix)}
    saving.save(encoder, folder / FOLDER, gathered=tower, writes=True)
    tensors = {name: gathered.get(name, parameter) for name, parameter in trained_outside(model).items()}
    write_tensors(folder / WEIGHTS, tensors)


def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
    """Attach a saved model, to continue training or to evaluate.

    Args:
        model: A model that ms-swift has loaded, not attached.
        model_id: A folder that `save_pretrained` wrote.
        **kwargs: `is_trainable` marks the loaded tensors as trainable.

    Returns:
        The model itself.

    Raises:
        CheckpointError: If `save_pretrained` did not write the folder, or for another model.
    """
    flags, folder = _flags(), Path(model_id)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} was not saved by the tuner covft.", expected=f"{WEIGHTS} and {FOLDER}/")
    tensors, parameters = load_file(folder / WEIGHTS), dict(model.named_parameters())
    # Tied weights, such as an output embedding, may be saved under another name.
    here = {name: parameters[name] for name in tensors if name in parameters}
    compare_tensors(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(parameter.shape) for name, parameter in here.items()},
        "the model",
    )
    check_trained_weights(tensors, str(folder / WEIGHTS))
    model.requires_grad_(False)
    attach(model, flags.text_encoder, tokenizer=_tokenizer(model, flags), pretrained=folder / FOLDER, **flags.reading)
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(bool(kwargs.get("is_trainable")))
    return model


def _flags() -> Flags:
    return parse(VARIABLE, [*shlex.split(os.environ.get(VARIABLE, "")), "ms-swift"])


def _tokenizer(model: Any, flags: Flags) -> Any:
    """Return the processor of a model, with the chat template that the flags name."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model.model_info.model_dir, trust_remote_code=False)
    if flags.chat_template is None:
        return processor
    tokenizer = getattr(processor, "tokenizer", processor)
    return SimpleNamespace(tokenizer=tokenizer, chat_template=template_of(flags.chat_template))
