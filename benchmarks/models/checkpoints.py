"""The checkpoints of `docs/models`: the sizes of their towers, as their published configs have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}
_SIGLIP = {**_SO400M, "num_hidden_layers": 27, "model_type": "siglip_vision_model", "vision_use_head": False}
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_INTERNVIT = {"num_attention_heads": 16, "use_qk_norm": False, "image_size": [448, 448], "patch_size": [14, 14]}
_QWEN3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
_PIXTRAL = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}


@dataclass(frozen=True)
class Checkpoint:
    """One or several checkpoints with a tower of the same size.

    Attributes:
        page: The page of `docs/models` that they are on.
        names: Ids on the Hugging Face Hub.
        model: Name of their class in transformers.
        vision: Fields of the config of their tower; the others are those of transformers.
        settings: Fields of the config of the model.
    """

    page: str
    names: tuple[str, ...]
    model: str
    vision: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


CHECKPOINTS = (
    Checkpoint(
        "llava",
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"),
        "LlavaForConditionalGeneration",
        _CLIP_L,
    ),
    Checkpoint(
        "llava-next",
        (
            "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            "llava-hf/llava-v1.6-vicuna-13b-hf",
        ),
        "LlavaNextForConditionalGeneration",
        _CLIP_L,
    ),
    Checkpoint(
        "llava-onevision",
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        "LlavaOnevisionForConditionalGeneration",
        {**_SIGLIP, "num_hidden_layers": 26, "image_size": 384},
    ),
    Checkpoint(
        "internvl",
        ("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-2B-hf", "OpenGVLab/InternVL3-8B-hf"),
        "InternVLForConditionalGeneration",
        {**_INTERNVIT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "attention_bias": True},
    ),
    Checkpoint(
        "internvl",
        ("OpenGVLab/InternVL3-38B-hf", "OpenGVLab/InternVL3-78B-hf"),
        "InternVLForConditionalGeneration",
        {
            **_INTERNVIT,
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
        },
    ),
    Checkpoint(
        "qwen2-vl",
        ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        "Qwen2VLForConditionalGeneration",
        {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16},
    ),
    Checkpoint(
        "qwen2-vl",
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        "Qwen2_5_VLForConditionalGeneration",
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    ),
    Checkpoint(
        "qwen3-vl",
        ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"),
        "Qwen3VLForConditionalGeneration",
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    ),
    Checkpoint(
        "qwen3-vl",
        ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-32B-Instruct"),
        "Qwen3VLForConditionalGeneration",
        {**_QWEN3, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    Checkpoint(
        "qwen3-vl",
        ("Qwen/Qwen3-VL-30B-A3B-Instruct",),
        "Qwen3VLMoeForConditionalGeneration",
        {**_QWEN3, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    Checkpoint("qwen3-5", ("Qwen/Qwen3.5-27B",), "Qwen3_5ForConditionalGeneration", _QWEN3),
    Checkpoint("qwen3-5", ("Qwen/Qwen3.5-35B-A3B",), "Qwen3_5MoeForConditionalGeneration", _QWEN3),
    Checkpoint(
        "gemma3",
        ("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it"),
        "Gemma3ForConditionalGeneration",
        {**_SIGLIP, "image_size": 896},
    ),
    Checkpoint(
        "paligemma",
        ("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-224"),
        "PaliGemmaForConditionalGeneration",
        {**_SIGLIP, "image_size": 224},
    ),
    Checkpoint(
        "smolvlm",
        ("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
        "SmolVLMForConditionalGeneration",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
    ),
    Checkpoint(
        "smolvlm",
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",),
        "SmolVLMForConditionalGeneration",
        {**_SO400M, "num_hidden_layers": 27, "image_size": 384},
    ),
    Checkpoint(
        "smolvlm",
        ("HuggingFaceTB/SmolVLM-Instruct",),
        "Idefics3ForConditionalGeneration",
        {**_SO400M, "num_hidden_layers": 27, "image_size": 384},
    ),
    Checkpoint(
        "smolvlm",
        ("HuggingFaceM4/Idefics3-8B-Llama3",),
        "Idefics3ForConditionalGeneration",
        {**_SO400M, "num_hidden_layers": 27, "image_size": 364},
    ),
    Checkpoint("glm-4v", ("zai-org/GLM-4.1V-9B-Thinking",), "Glm4vForConditionalGeneration", {}),
    Checkpoint(
        "pixtral",
        ("mistral-community/pixtral-12b",),
        "LlavaForConditionalGeneration",
        {**_PIXTRAL, "image_size": 1024, "patch_size": 16},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    Checkpoint(
        "pixtral",
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503",),
        "Mistral3ForConditionalGeneration",
        {**_PIXTRAL, "image_size": 1540, "patch_size": 14},
    ),
    Checkpoint(
        "llama-3-2-vision",
        ("meta-llama/Llama-3.2-11B-Vision-Instruct",),
        "MllamaForConditionalGeneration",
        {"image_size": 560},
    ),
)
