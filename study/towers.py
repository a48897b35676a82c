"""The small ViT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from study.data.scenes import SIZE
from study.weights import ASSETS, load_weights

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

PATCH = 10
IMAGE_TOKENS = (SIZE // PATCH) ** 2


def small_vit_config() -> CLIPVisionConfig:
    """Return six blocks of width 128 on 6 x 6 patches of ten pixels."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip


def small_vit(folder: Path = ASSETS) -> CLIPVisionModel:
    """Load the small ViT in eval mode.

    Raises:
        CheckpointError: If its weights are missing or do not match their card.
    """
    from transformers import CLIPVisionModel

    model = CLIPVisionModel(small_vit_config())
    model.load_state_dict(load_weights(folder, "small_vit"))
    return model.eval()
