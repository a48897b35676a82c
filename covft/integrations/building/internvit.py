"""InternViT as OpenGVLab publishes it (`intern_vit_6b`), as transformers' own InternVLVisionModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covft.errors import CheckpointError

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


def load_internvit(
    name: str, config: Mapping[str, Any], *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> Any:
    """Load the published layout, which transformers reads only by running the repository's own code.

    Args:
        name: Id of the repository, or a folder.
        config: What its `config.json` says.
        dtype: Of the weights; None leaves them as they are saved.
        attn_implementation: Passed on to transformers.

    Returns:
        An `InternVLVisionModel` in eval mode.

    Raises:
        CheckpointError: If the tensors are not those of this config.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    from transformers import InternVLVisionModel

    local = Path(name)
    folder = local if local.is_dir() else Path(snapshot_download(name, allow_patterns=["*.safetensors"]))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    state = convert(tensors)
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    with torch.device("meta"):
        model = InternVLVisionModel._from_config(
            internvl_config(config, name),
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights of {name} are not those of its config.",
            expected=f"{len(model.state_dict())} tensors, named as in InternViT-300M-448px",
            got=str(error)[:500],
        ) from error
    return model.eval()


def internvl_config(config: Mapping[str, Any], name: str = "") -> Any:
    """The config of transformers for a published one.

    Args:
        config: What `config.json` says.
        name: Where it came from; the model tells it.
    """
    from transformers import InternVLVisionConfig

    same = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "image_size",
        "patch_size", "layer_norm_eps", "attention_dropout",
    )  # fmt: skip
    ours = InternVLVisionConfig(
        **{key: config[key] for key in same if key in config},
        # Defaults are those of the published configuration class.
        attention_bias=config.get("qkv_bias", False),
        use_qk_norm=config.get("qk_normalization", True),
        norm_type=config.get("norm_type", "rms_norm"),
        projection_dropout=config.get("dropout", 0.0),
    )
    ours.name_or_path = name
    return ours


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under transformers' names; fused queries, keys and values are cut apart.

    Args:
        tensors: The published state dict.
    """
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
