"""A cache of the Hugging Face Hub, so that repositories can be read without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_cache(monkeypatch: Any, cache: Path) -> None:
    """Have the libraries look for repositories in this folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def put_in_cache(cache: Path, repo_id: str, folder: Path) -> Path:
    """Copy a folder to the cache, as if the repository of this id had been downloaded."""
    place = cache / f"models--{repo_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, place / "snapshots" / COMMIT))
