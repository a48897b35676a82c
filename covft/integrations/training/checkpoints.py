"""Checkpoints of a training run: covft's additions to a trainer's folder, and the check that it is complete.

    checkpoint-500/
      ...                        written by the trainer: model, optimizer, scheduler, random states
      covft/                     the adapted tower, as `covft.load` and `covft.attach(pretrained=...)` read it
      covft/trained.safetensors  all other trained tensors, by their names in the running model
      covft/trained.json         their names, those of the tower's trained tensors, and the digest of that file
      complete.json              written last: every file with its size

A trainer writes one file after another, so a killed run leaves a folder that looks like a checkpoint. It has no
`complete.json`, and is refused. A checkpoint that is overwritten loses its `complete.json` first.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from covft.checkpoints import trained
from covft.checkpoints.folder import compare_tensors
from covft.checkpoints.pretrained import FOLDER
from covft.errors import CheckpointError
from covft.integrations.mllm.attachment import attachment_of
from covft.surgery.adapted import AdaptedViT
from covft.utils.arguments import check_kinds
from covft.utils.files import is_temporary, write_json
from covft.utils.sharding import assign, shape_of
from covft.utils.strict_json import read_strictly

SEAL = "complete.json"


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Return the folder of a trainer's checkpoint at its present step.

    Args:
        args: The `TrainingArguments`.
        state: The `TrainerState`.
    """
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def write_trained(model: nn.Module, folder: Path, *, main: bool = True) -> None:
    """Write all trained tensors outside the tower, by their names in the running model.

    Args:
        model: The attached model of the trainer.
        folder: The `covft/` folder of a checkpoint.
        main: Whether this process writes. All processes have to call this if tensors are sharded.

    Raises:
        CheckpointError: If a tensor has no values.
    """
    attachment = attachment_of(model)
    assert attachment is not None, "checked by the callback"
    trained.write_trained(attachment.encoder, model, folder, main=main)


def restore(model: nn.Module, checkpoint: str | Path) -> None:
    """Load the trained tensors of a checkpoint into the running model, strictly.

    Args:
        model: The attached model of the trainer, with the same trained parameters as the saved one.
        checkpoint: A checkpoint folder.

    Raises:
        CheckpointError: If the checkpoint is incomplete or damaged, or its tensors do not fit the model.
    """
    checkpoint = Path(checkpoint)
    check_checkpoint(checkpoint)
    attachment = attachment_of(model)
    assert attachment is not None, "checked by the callback"
    folder = checkpoint / FOLDER
    tensors = trained.read_trained(folder)
    wanted = trained_outside(model)
    compare_tensors(
        {name: shape_of(parameter) for name, parameter in wanted.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        f"{folder / trained.TRAINED}",
    )
    attachment.encoder.load_into(folder)
    for name, parameter in wanted.items():
        assign(parameter, tensors[name])


def check_trained(model: nn.Module, checkpoint: str | Path) -> None:
    """Refuse a checkpoint of a run that trained other parameters, before anything is loaded.

    Args:
        model: The attached model of the trainer.
        checkpoint: A complete checkpoint.

    Raises:
        CheckpointError: If other parameters are trained now.
    """
    path = Path(checkpoint) / FOLDER / trained.TRAINED_NAMES
    index = trained.read_names(path)
    now, then = set(trained_outside(model)), set(index["names"])
    if index["tower"] is not None:
        now, then = now | trained.trained_inside(_encoder(model), model), then | set(index["tower"])
    compare_tensors(dict.fromkeys(now, ()), dict.fromkeys(then, ()), str(path))


def trained_outside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters outside the tower of an attached model, by their names in the running model."""
    return trained.trained_outside(_encoder(model), model)


def _encoder(model: nn.Module) -> AdaptedViT | None:
    attachment = attachment_of(model)
    return None if attachment is None else attachment.encoder


def unseal(checkpoint: str | Path) -> None:
    """Mark a checkpoint incomplete before its files are overwritten: a mix of two runs has files of the right sizes.

    Args:
        checkpoint: Its folder, which need not exist.
    """
    seal_file = Path(checkpoint) / SEAL
    try:
        seal_file.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{seal_file} cannot be removed.", got=f"{type(error).__name__}: {error}") from error


def seal(checkpoint: str | Path, step: int) -> None:
    """Mark a checkpoint complete, after all of its other files were written.

    Args:
        checkpoint: Its folder.
        step: The optimizer step before it.
    """
    checkpoint = Path(checkpoint)
    files = {name: size for name, size in _files(checkpoint).items() if name != SEAL}
    write_json(checkpoint / SEAL, {"format": 1, "step": step, "files": files})


@check_kinds
def check_checkpoint(checkpoint: str | Path) -> None:
    """Refuse an incomplete checkpoint.

    Args:
        checkpoint: Its folder.

    Raises:
        CheckpointError: If the folder is not a checkpoint, its writing was interrupted, or a file has another size.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / SEAL).is_file():
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: its writing was interrupted, or covft did not write it.",
            expected=f"a folder with {SEAL}, which is written last",
            got=", ".join(sorted(entry.name for entry in checkpoint.iterdir()))
            if checkpoint.is_dir()
            else "no such folder",
            fix="resume_from_checkpoint=True, which takes the last complete one",
        )
    try:
        stated: dict[str, int] = read_strictly(checkpoint / SEAL)["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / SEAL} is damaged.", got=str(error)) from error
    found = _files(checkpoint)
    wrong = [name for name, size in stated.items() if found.get(name) != size][:5]
    if wrong:
        raise CheckpointError(
            f"{checkpoint} has changed since it was written: files are missing or truncated.",
            expected=", ".join(f"{name} of {stated[name]} bytes" for name in wrong),
            got=", ".join(f"{found[name]} bytes" if name in found else "missing" for name in wrong),
            fix="resume_from_checkpoint=True, which takes the last complete one",
        )


@check_kinds
def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the last complete checkpoint of a run; a warning names later, incomplete ones.

    Args:
        output_dir: The run's folder.

    Returns:
        Its folder; None if there are no checkpoints.

    Raises:
        CheckpointError: If there are checkpoints, and all are incomplete.
    """
    folder = Path(output_dir)
    numbered = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    problems: list[str] = []
    for _, checkpoint in sorted(numbered, reverse=True):
        try:
            check_checkpoint(checkpoint)
        except CheckpointError as error:
            problems.append(error.problem)
            continue
        for problem in problems:
            warnings.warn(f"{problem} Taking {checkpoint.name} instead.", UserWarning, stacklevel=2)
        return checkpoint
    if problems:
        raise CheckpointError(
            f"None of the checkpoints in {folder} is complete.",
            expected=f"a folder with {SEAL}",
            got="; ".join(problems),
            fix="resume_from_checkpoint=None, which starts from scratch",
        )
    return None


def _files(folder: Path) -> dict[str, int]:
    """Return the sizes of all files by their paths, without temporary ones."""
    paths = ((path, path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    return {name.as_posix(): p.stat().st_size for p, name in paths if not is_temporary(name) and p.is_file()}
