"""Saves and loads the projector alone, which stage 1 trains and stage 2 starts from."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from covft.checkpoints.folder import check_trained_weights
from covft.errors import CheckpointError, UnsupportedViTError
from covft.utils.arguments import check_kinds
from covft.utils.files import write_tensors
from covft.utils.sharding import full, is_distributed, is_main_process

PROJECTOR_NAME = "projector.safetensors"


@check_kinds
def save_projector(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Save the projector of a multimodal LLM.

    Call it on every process: sharded weights (FSDP2, ZeRO-3) are gathered, and the first process writes. The file is
    written under another name and renamed, so an interrupted save leaves no incomplete file.

    Args:
        model: A LLaVA or InternVL, also wrapped by a trainer.
        folder: Where `projector.safetensors` goes; created if missing.

    Returns:
        The file.

    Raises:
        UnsupportedViTError: If the model has no projector.
        CheckpointError: If the file cannot be written; an old one is then as it was.
    """
    values = find_projector(model).state_dict(keep_vars=True)
    state = {name: full(value).cpu() for name, value in values.items()}
    path = Path(folder) / PROJECTOR_NAME
    if is_main_process():
        write_tensors(path, state)
    if is_distributed():
        torch.distributed.barrier()  # no process continues before the file exists
    return path


@check_kinds
def load_projector(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load a saved projector into a model, keeping the model's device and dtype.

    Args:
        model: A LLaVA or InternVL, before a trainer gets it.
        folder: The folder of `save_projector`, or the file.

    Raises:
        CheckpointError: If the file is missing, truncated, or of another projector; the model is unchanged then.
        UnsupportedViTError: If the model has no projector.
    """
    projector = find_projector(model)
    path = Path(folder)
    path = path / PROJECTOR_NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"The projector {path} does not exist.",
            expected=f"a file of save_projector, {PROJECTOR_NAME} in its folder",
            got="no such file",
            fix="save_projector(model, folder)",
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or damaged.", got=str(error), fix="copy it again, or rerun stage 1"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        raise CheckpointError(
            f"{path} is not a projector of this model.",
            expected=", ".join(f"{name} {shape}" for name, shape in wanted.items()),
            got=", ".join(f"{name} {shape}" for name, shape in found.items()),
            fix="the vision tower, language model and vision_feature_layer that it was trained with",
        )
    check_trained_weights(state, str(path))
    projector.load_state_dict(state)


def find_projector(model: nn.Module) -> nn.Module:
    """Return the module between tower and language model.

    Args:
        model: A LLaVA or InternVL, also wrapped by peft, DDP or a trainer.

    Raises:
        UnsupportedViTError: If there is not exactly one.
    """
    found = [
        module for name, module in model.named_modules() if name.rpartition(".")[2] == "multi_modal_projector"
    ]  # fmt: skip
    if len(found) != 1:
        raise UnsupportedViTError(
            f"{type(model).__name__} has {len(found)} projectors.",
            expected="a model with one multi_modal_projector, such as LLaVA or InternVL",
            got=type(model).__name__,
        )
    return found[0]
