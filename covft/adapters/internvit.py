"""Reads the layout in which OpenGVLab publishes InternViT (`intern_vit_6b`) as transformers' InternVLVisionModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from covft.utils.transformers_names import named_class

MODEL_TYPE = "intern_vit_6b"  # of all sizes, 300M among them
_NAMES = (
    ("class_embedding", "cls_token"),
    ("position_embedding", "position_embeddings"),
    ("patch_embedding.", "patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
_SAME = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "image_size",
    "patch_size", "layer_norm_eps", "attention_dropout",
)  # fmt: skip


def published_weights(name: str, *, subfolder: str = "", **hub: Any) -> dict[str, Tensor]:
    """Read the published weights under transformers' names.

    Args:
        name: Id of the repository, or a folder.
        subfolder: Folder of the weights in it.
        **hub: For `huggingface_hub.snapshot_download`, such as `revision`.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    pattern = f"{subfolder}/*.safetensors" if subfolder else "*.safetensors"
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=[pattern], **hub))
    return convert({key: tensor for file in sorted(folder.glob(pattern)) for key, tensor in load_file(file).items()})


def internvit_config(published: Mapping[str, Any]) -> Any:
    """Return transformers' config for what the published `config.json` says."""
    return named_class("InternVLVisionConfig", "An InternViT")(
        **{key: published[key] for key in _SAME if key in published},
        # Defaults are those of the published configuration class.
        attention_bias=published.get("qkv_bias", False),
        use_qk_norm=published.get("qk_normalization", True),
        norm_type=published.get("norm_type", "rms_norm"),
        projection_dropout=published.get("dropout", 0.0),
    )


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published tensors as transformers does, and split the fused queries, keys and values."""
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        for theirs, ours in _NAMES:
            key = key.replace(theirs, ours)
        if ".attention.qkv." in key:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                state[key.replace(".qkv.", f".{part}_proj.")] = values.clone()
        else:
            state[key] = tensor
    return state
