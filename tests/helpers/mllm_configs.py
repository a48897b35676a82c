"""Small configs of multimodal LLMs, from the real config classes, and weights that let images matter."""

from __future__ import annotations

from typing import Any

import torch

from covft.utils.transformers_names import OLDEST_TRAINED
from tests.helpers.releases import skip_before

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 32, 4
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
PACKED_VISION = {"depth": DEPTH, "num_heads": 4, "patch_size": PATCH, "hidden_size": WIDTH}


def llava(text: dict[str, Any], image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**text), image_token_index=image
    )


def llava_next(text: dict[str, Any], image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_index=image,
        image_grid_pinpoints=PINPOINTS,
    )


def llava_onevision(text: dict[str, Any], image: int) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**text),
        image_token_index=image,
        video_token_index=text["vocab_size"] - 1,
        image_grid_pinpoints=PINPOINTS,
    )


def internvl(text: dict[str, Any], image: int) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    vision = {**VISION, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=Qwen2Config(**text),
        image_token_id=image,
        image_seq_length=4,
    )


def paligemma(text: dict[str, Any], image: int) -> Any:
    from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=GemmaConfig(**text, head_dim=8),
        image_token_index=image,
        projection_dim=32,
    )


def gemma3(text: dict[str, Any], image: int) -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    return Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Gemma3TextConfig(**text, head_dim=8, sliding_window=64),
        image_token_index=image,
        boi_token_index=text["vocab_size"] - 2,
        eoi_token_index=text["vocab_size"] - 3,
        mm_tokens_per_image=4,
    )


def idefics3(text: dict[str, Any], image: int) -> Any:
    from transformers import Idefics3Config, Idefics3VisionConfig, LlamaConfig

    return Idefics3Config(
        vision_config=Idefics3VisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_id=image,
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
    )


def smolvlm(text: dict[str, Any], image: int) -> Any:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMVisionConfig

    return SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_id=image,
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
    )


def rope(**more: Any) -> dict[str, Any]:
    """Rotary embeddings, under the name of the installed release."""
    import transformers

    name = "rope_parameters" if transformers.__version__ >= "5" else "rope_scaling"
    return {name: {"rope_type": "default", "rope_theta": 1e4, **more}}


def mrope(text: dict[str, Any]) -> dict[str, Any]:
    return {**text, **rope(mrope_section=[2, 1, 1])}


def tokens(text: dict[str, Any], image: int) -> dict[str, int]:
    """Ids of marks; the template never writes the token that begins a text, so it may stand for videos."""
    start, end = image + 1, image + 2  # <img> and </img>, which follow <image> in every tokenizer of prompts.py
    marks = {"image_start_token_id": start, "image_end_token_id": end}
    video = {"video_token_id": text["bos_token_id"], "vision_start_token_id": start, "vision_end_token_id": end}
    return {"image_token_id": image, **video, **marks}


def qwen2_vl(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen2VLConfig

    vision = {**PACKED_VISION, "embed_dim": WIDTH, "mlp_ratio": 2}
    return Qwen2VLConfig(vision_config=vision, text_config=mrope(text), **tokens(text, image))


def qwen2_5_vl(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen2_5_VLConfig

    skip_before(OLDEST_TRAINED, "a text config in Qwen2_5_VLConfig")
    windows = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}
    vision = {**PACKED_VISION, **windows, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=mrope(text), **tokens(text, image))


def qwen3_vl(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen3VLConfig

    vision = {**PACKED_VISION, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [1, 2]
    return Qwen3VLConfig(vision_config=vision, text_config={**mrope(text), "head_dim": 8}, **tokens(text, image))


def qwen3_vl_moe(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen3VLMoeConfig

    plain = qwen3_vl(text, image)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    vision = plain.vision_config.to_dict()
    return Qwen3VLMoeConfig(
        vision_config=vision, text_config={**mrope(text), "head_dim": 8, **moe}, **tokens(text, image)
    )


def qwen3_5(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen3_5Config

    heads = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
    widths = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    layers = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    vision = {**PACKED_VISION, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32, "num_position_embeddings": 16}
    return Qwen3_5Config(
        vision_config=vision, text_config={**mrope(text), **heads, **widths, **layers}, **tokens(text, image)
    )


def glm4v(text: dict[str, Any], image: int) -> Any:
    from transformers import Glm4vConfig

    vision = {**PACKED_VISION, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32, "image_size": SIZE}
    return Glm4vConfig(vision_config=vision, text_config=mrope(text), **tokens(text, image))


def pixtral_vision() -> Any:
    from transformers import PixtralVisionConfig

    return PixtralVisionConfig(**{**VISION, "image_size": 6 * PATCH})


def pixtral(text: dict[str, Any], image: int) -> Any:
    from transformers import LlavaConfig, MistralConfig

    return LlavaConfig(
        vision_config=pixtral_vision(),
        text_config=MistralConfig(**text),
        image_token_index=image,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )


def mistral3(text: dict[str, Any], image: int) -> Any:
    from transformers import Mistral3Config, MistralConfig

    return Mistral3Config(
        vision_config=pixtral_vision(),
        text_config=MistralConfig(**text),
        image_token_index=image,
        spatial_merge_size=2,
    )


def mllama(text: dict[str, Any], image: int) -> Any:
    from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

    vision = {**VISION, "num_hidden_layers": 3, "num_global_layers": 2, "intermediate_layers_indices": [0, 2]}
    return MllamaConfig(
        vision_config=MllamaVisionConfig(**vision, vision_output_dim=3 * WIDTH),
        text_config=MllamaTextConfig(**text, **rope(), cross_attention_layers=[1]),
        image_token_index=image,
    )


def vipllava(text: dict[str, Any], image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig

    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_index=image,
        vision_feature_layers=[-2, -3],
    )


@torch.no_grad()
def enliven(model: torch.nn.Module) -> None:
    """Scale weights up: new projectors and gates are so small, or zero, that no image would matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(3) if parameter.any() else parameter.normal_()
        elif name.endswith("gate"):
            parameter.fill_(1)
