"""The weights of the small networks, committed with cards that describe them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from covft.errors import CheckpointError
from covft.utils.files import Pair, read_tensors, write_pair
from study.data.tokenizer import vocabulary_sha256

ASSETS = Path(__file__).parent / "assets"
COMMAND = "python -m study pretrain"
_OF_WORDS = ("language_model",)  # weights that depend on the vocabulary


def save_weights(folder: Path, name: str, model: torch.nn.Module, settings: dict, scores: dict) -> dict:
    """Write `name.safetensors` in half precision and its card, `name.json`; return the card."""
    weights = {
        key: value.half()
        for key, value in model.state_dict().items()
        if "position_ids" not in key and key != "lm_head.weight"  # tied to the embeddings
    }
    card = {
        "made_by": COMMAND,
        "settings": settings,
        "scores": scores,
        "parameters": sum(value.numel() for value in weights.values()),
    }
    if name in _OF_WORDS:
        card["vocabulary"] = vocabulary_sha256()
    pair = Pair(f"{name}.safetensors", f"{name}.json")
    return write_pair(folder, pair, weights, lambda stated: {**card, **stated})


def load_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Read weights written by `save_weights`, in float32.

    Raises:
        CheckpointError: If they are missing, do not match their card, or have another vocabulary than the study.
    """
    path, card = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not path.is_file() or not card.is_file():
        raise CheckpointError(
            f"the weights of {name} are missing.",
            expected=f"{path.name} and {card.name} in {folder}",
            fix=f"git checkout study/assets, or {COMMAND}",
        )
    stated = json.loads(card.read_text())
    if name in _OF_WORDS and stated.get("vocabulary") != vocabulary_sha256():
        raise CheckpointError(
            f"the weights of {name} were made for other words than the study's questions have now.",
            expected=f"vocabulary {vocabulary_sha256()[:12]}...",
            got=f"vocabulary {str(stated.get('vocabulary'))[:12]}... in {card}",
            fix=f"{COMMAND} --output {folder}",
        )
    tensors = read_tensors(path, stated, card.name)
    return {key: value.float() for key, value in tensors.items()}
