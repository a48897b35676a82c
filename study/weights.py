"""The weights of the small networks, committed with cards that describe them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from covft.errors import CheckpointError
from covft.utils.files import Pair, read_tensors, write_pair

ASSETS = Path(__file__).parent / "assets"


def save_weights(folder: Path, name: str, model: torch.nn.Module, settings: dict, scores: dict) -> dict:
    """Write `name.safetensors` in half precision and its card, `name.json`; return the card."""
    weights = {
        key: value.half()
        for key, value in model.state_dict().items()
        if "position_ids" not in key and key != "lm_head.weight"  # tied to the embeddings
    }
    card = {
        "made_by": "python -m study pretrain",
        "settings": settings,
        "scores": scores,
        "parameters": sum(value.numel() for value in weights.values()),
    }
    pair = Pair(f"{name}.safetensors", f"{name}.json")
    return write_pair(folder, pair, weights, lambda stated: {**card, **stated})


def load_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Read weights written by `save_weights`, in float32.

    Raises:
        CheckpointError: If they are missing or do not match their card.
    """
    path, card = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not path.is_file() or not card.is_file():
        raise CheckpointError(
            f"the weights of {name} are missing.",
            expected=f"{path.name} and {card.name} in {folder}",
            fix="git checkout study/assets, or python -m study pretrain",
        )
    tensors = read_tensors(path, json.loads(card.read_text()), card.name)
    return {key: value.float() for key, value in tensors.items()}
