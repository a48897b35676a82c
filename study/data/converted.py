"""Weights of packages as folders in the user's cache, which transformers loads quickly: converted once.

On a machine without the packages, the folders come from the prepared file, if it was made with `--size large`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from covft.errors import CheckpointError


def cache_folder() -> Path:
    """Return `covft` in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "covft"


def converted_folder(name: str, convert: Callable[[Path], None], cache: Path | None = None) -> Path:
    """Return a folder of converted weights; the first call fills it, aside and then renamed.

    Args:
        name: Name of the folder.
        convert: Makes the folder and writes its files, where the prepared file does not have them.
        cache: Folder that it lies in; default `cache_folder()`.
    """
    from study.data.prepared import unpack_folder

    folder = (cache or cache_folder()) / name
    if folder.is_dir():
        return folder
    aside = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
    try:
        if not unpack_folder(name, aside):
            convert(aside)
        try:
            aside.rename(folder)
        except OSError:
            # another process converted it first; its result is checked too
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def tensors_sha256(file: Path) -> str:
    """Return a digest of names and values, which does not depend on the layout of the file."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(file, "np") as tensors:
        for name in sorted(tensors.keys()):
            digest.update(name.encode())
            digest.update(tensors.get_tensor(name).tobytes())
    return digest.hexdigest()


def check_sha256(what: str, found: str, known: str, fix: str) -> None:
    """Compare two digests.

    Args:
        what: What they are of.
        found: What it has.
        known: What it should have.
        fix: What to do if they differ.

    Raises:
        CheckpointError: If they differ.
    """
    if found != known:
        raise CheckpointError(
            f"{what} is not the expected one.",
            expected=f"sha256 {known}",
            got=f"sha256 {found}",
            fix=fix,
        )
