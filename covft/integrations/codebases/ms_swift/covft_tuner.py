"""ms-swift's `--tuner_type covft`: trains the adapted tower, and the parts that ms-swift's flags leave unfrozen.

A checkpoint holds `covft/`, the adapted tower, and `model.safetensors`, all other trained tensors.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from covft.checkpoints.folder import check_trained_weights, compare_tensors
from covft.checkpoints.pretrained import FOLDER, prefix_of
from covft.errors import CheckpointError, ConfigError
from covft.integrations.codebases.conversations import template_of
from covft.integrations.codebases.launch import Flags, parse
from covft.integrations.mllm.attach import attach
from covft.integrations.mllm.attachment import attachment_of
from covft.integrations.training.checkpoints import check_checkpoint, trained_outside
from covft.integrations.tuning.tune import tune
from covft.utils.files import write_tensors

VARIABLE = "COVFT_FLAGS"
# transformers' Trainer looks for weights of this name when it resumes.
WEIGHTS = "model.safetensors"


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
    flags = flags_of_run(model)
    architecture: Any = model.model_meta.model_arch
    model.requires_grad_(False)
    unfreeze(model, [] if args.freeze_llm else architecture.language_model)
    attach_new(model, flags)
    unfreeze(model, [] if args.freeze_aligner else architecture.aligner)  # that of Qwen-VL is a part of the tower
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
    assert attachment is not None, "attached by prepare_model or from_pretrained"
    folder, encoder, gathered = Path(save_directory), attachment.encoder, state_dict or {}
    prefix = prefix_of(encoder.vit, model)
    tower = {name.removeprefix(prefix): tensor for name, tensor in gathered.items() if name.startswith(prefix)}
    encoder.write(folder / FOLDER, gathered=tower, writes=True)
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
    folder, trained = Path(model_id), bool(kwargs.get("is_trainable"))
    if not (folder / WEIGHTS).is_file() or not (folder / FOLDER).is_dir():
        raise CheckpointError(f"{folder} was not saved by the tuner covft.", expected=f"{WEIGHTS} and {FOLDER}/")
    if trained:
        refuse_incomplete(folder)
    tensors = _read_tensors(model, folder / WEIGHTS)
    model.requires_grad_(False)
    attach_saved(model, folder)
    _assign_tensors(model, tensors, trained)
    return model


def refuse_incomplete(folder: Path) -> None:
    """Refuse to train from a checkpoint that is incomplete.

    Raises:
        CheckpointError: If it is.
    """
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        fix = "--resume_from_checkpoint with an earlier checkpoint"
        raise CheckpointError(error.problem, expected=error.expected, got=error.got, fix=fix) from None


def flags_of_run(model: Any) -> Flags:
    """Return covft's flags for a new run.

    Raises:
        ConfigError: If the folder of the model has an adapted tower that they do not name.
    """
    flags = _flags()
    saved = Path(model.model_info.model_dir) / FOLDER
    if flags.pretrained is None and saved.is_dir():
        raise ConfigError(
            "The model was saved with an adapted tower, and this run would start from the original one.",
            expected=f"--covft_pretrained in {VARIABLE}",
            got=str(saved),
            fix=f'{VARIABLE}="--covft_pretrained {saved} ..."',
        )
    return flags


def unfreeze(model: nn.Module, paths: Iterable[str]) -> None:
    """Train modules or parameters of a model, by their paths."""
    for path in paths:
        attrgetter(path)(model).requires_grad_(True)


def attach_new(model: Any, flags: Flags) -> None:
    """Attach a model as the flags say."""
    text_encoder, tokenizer = flags.text_encoder_for(flags.pretrained), _tokenizer(model, flags)
    if flags.pretrained is None:
        settings = {**flags.reading, **flags.settings}
        tune(model, flags.method, text_encoder=text_encoder, tokenizer=tokenizer, **settings)
    else:
        options = {"pretrained": flags.pretrained, **flags.reading, **flags.settings}
        attach(model, text_encoder, tokenizer=tokenizer, **options)
    if flags.pretrained is not None:
        _note_source(model, Path(flags.pretrained))


def attach_saved(model: Any, folder: Path) -> None:
    """Attach a model with the tower of a checkpoint."""
    flags = _flags()
    saved = folder / FOLDER
    attach(model, flags.text_encoder, tokenizer=_tokenizer(model, flags), pretrained=saved, **flags.reading)
    _note_source(model, saved)


def _read_tensors(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Read trained tensors, and refuse those of another model.

    Raises:
        CheckpointError: If they do not fit, or are not finite.
    """
    tensors, parameters = load_file(path), dict(model.named_parameters())
    compare_tensors(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(parameters[name].shape) for name in tensors if name in parameters},
        "the model",
    )
    check_trained_weights(tensors, str(path))
    return tensors


def _assign_tensors(model: nn.Module, tensors: Mapping[str, Tensor], trained: bool) -> None:
    """Copy tensors into a model, and train them or not."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
            parameters[name].requires_grad_(trained)


def _note_source(model: nn.Module, folder: Path) -> None:
    """Note where the tower's weights are: a trainer reads them again, once it has made the tower float32."""
    attachment = attachment_of(model)
    assert attachment is not None, "attached a moment ago"
    attachment.encoder.saved_in = folder


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
