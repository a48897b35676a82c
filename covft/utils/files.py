"""Writes files completely or not at all, and checks them when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from covft.errors import CheckpointError
from covft.utils.sharding import is_sharded


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **about: str) -> dict[str, Any]:
    """Write tensors and metadata to a `.safetensors` file atomically, and make its folder if needed.

    Returns:
        The file's statement for `read_tensors`: `bytes` and `sha256`.

    Raises:
        CheckpointError: If a tensor is empty or a shard.
    """
    parts = [name for name, tensor in tensors.items() if is_sharded(tensor) or not tensor.numel()]
    if parts:
        raise CheckpointError(
            "Sharded weights would be saved empty or in part.",
            expected="full tensors",
            got=f"{len(parts)} of {len(tensors)}: {', '.join(parts[:5])}",
            fix="encoder.save_pretrained(folder) on every process",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_aside(path) as aside:
        save_file(on_cpu, aside, {"format": "pt", **about})
        return _statement(aside)


def _statement(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def read_tensors(path: Path, stated: Mapping[str, Any], stated_in: str) -> dict[str, Tensor]:
    """Read tensors from a file that still matches its statement, which stands in the file `stated_in`.

    Raises:
        CheckpointError: If the file is missing, truncated, damaged, or of another save.
    """
    found = _statement(path) if path.is_file() else {"bytes": 0, "sha256": ""}
    if (found["bytes"], found["sha256"]) != (stated["bytes"], stated["sha256"]):
        raise CheckpointError(
            f"{path} is not the file that {stated_in} was written for: cut short, damaged, or of another save.",
            expected=f"{stated['bytes']} bytes, sha256 {stated['sha256'][:12]}...",
            got=f"{found['bytes']} bytes, sha256 {found['sha256'][:12]}..." if path.is_file() else "no such file",
            fix="save again, or copy the complete folder again",
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read.", got=str(error)) from error


def file_sha256(path: Path) -> str:
    """Return the digest of a file in hex, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, and rename it to `path` once it is complete and on disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
