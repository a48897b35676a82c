"""A cache of the Hugging Face Hub, so that repositories can be read without a network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_cache(monkeypatch: Any, cache: Path) -> None:
    """Have the libraries look for repositories in this folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    if transformers := sys.modules.get("transformers.utils.hub"):
        monkeypatch.setattr(transformers, "TRANSFORMERS_CACHE", str(cache), raising=False)  # before release 5


def without_repositories(monkeypatch: Any) -> None:
    """Have nothing created on the Hub."""
    from transformers.utils import hub

    def create(repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: create(repo_id))
    monkeypatch.setattr(hub, "create_repo", create, raising=False)  # before release 5


def put_in_cache(cache: Path, repo_id: str, folder: Path) -> Path:
    """Copy a folder to the cache, as if the repository of this id had been downloaded."""
    place = cache / f"models--{repo_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, place / "snapshots" / COMMIT))
