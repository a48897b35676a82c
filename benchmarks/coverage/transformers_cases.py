"""Lists the vision towers of transformers: how to build a small one of each class, and its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.coverage import transformers_inputs as inputs
from benchmarks.coverage.transformers_configs import DEPTH, PATCH, SIZE, WIDTH, load_class, small_config

# Vision base classes by folder; a file of another name stands after a slash.
CLASSES = {
    "aimv2": "Aimv2VisionModel",
    "altclip": "AltCLIPVisionModel",
    "beit": "BeitModel BeitBackbone",
    "blip": "BlipVisionModel",
    "blip_2": "Blip2VisionModel Blip2VisionModelWithProjection",
    "bridgetower": "BridgeTowerVisionModel",
    "chinese_clip": "ChineseCLIPVisionModel",
    "clip": "CLIPVisionModel CLIPVisionModelWithProjection",
    "clipseg": "CLIPSegVisionModel",
    "cohere_compass": "CohereCompassVisionModel",
    "cosmos3_edge": "Cosmos3EdgeVisionModel",
    "cvt": "CvtModel",
    "data2vec/data2vec_vision": "Data2VecVisionModel",
    "deepseek_ocr2": "DeepseekOcr2SamVisionEncoder DeepseekOcr2VisionEncoder DeepseekOcr2VisionModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model Dinov2Backbone",
    "dinov2_with_registers": "Dinov2WithRegistersModel Dinov2WithRegistersBackbone",
    "dinov3_vit": "DINOv3ViTModel DINOv3ViTBackbone",
    "donut/donut_swin": "DonutSwinModel",
    "dots3_note": "Dots3NoteVisionModel",
    "dpt": "DPTModel",
    "edgetam": "EdgeTamVisionModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeVisionTransformerPretrainedModel Ernie4_5_VL_MoeVisionTransformerPretrainedModel",
    "exaone4_5": "Exaone4_5_VisionModel",
    "flava": "FlavaImageModel",
    "florence2": "Florence2VisionBackbone",
    "gemma4": "Gemma4VisionModel",
    "git": "GitVisionModel",
    "glm4v": "Glm4vVisionModel",
    "glm4v_moe": "Glm4vMoeVisionModel",
    "glm5_next": "Glm5NextVisionModel",
    "glm_image": "GlmImageVisionModel",
    "glm_ocr": "GlmOcrVisionModel",
    "glpn": "GLPNModel",
    "got_ocr2": "GotOcr2VisionEncoder",
    "granite_docling": "GraniteDoclingVisionModel",
    "groupvit": "GroupViTVisionModel",
    "hiera": "HieraModel HieraBackbone",
    "hunyuan_vl": "HunYuanVLVisionTransformer",
    "idefics2": "Idefics2VisionTransformer",
    "idefics3": "Idefics3VisionTransformer",
    "ijepa": "IJepaModel",
    "inkling": "InklingVisionModel",
    "inkling2": "Inkling2VisionModel",
    "instructblip": "InstructBlipVisionModel",
    "instructblipvideo": "InstructBlipVideoVisionModel",
    "internvl": "InternVLVisionModel",
    "janus": "JanusVisionModel",
    "kimi_k25": "Kimi_K25VisionModel",
    "kosmos2": "Kosmos2VisionTransformer Kosmos2VisionModel",
    "kosmos2_5": "Kosmos2_5VisionEncoder Kosmos2_5VisionModel",
    "levit": "LevitModel",
    "lfm3_vl": "Lfm3VlVisionModel",
    "llama4": "Llama4VisionModel",
    "lw_detr": "LwDetrViTBackbone",
    "maskformer/maskformer_swin": "MaskFormerSwinModel MaskFormerSwinBackbone",
    "metaclip_2": "MetaClip2VisionModel MetaClip2VisionModelWithProjection",
    "mgp_str": "MgpstrModel",
    "minicpm_ocr": "MiniCPMOcrVisionModel",
    "minicpmv4_6": "MiniCPMV4_6VisionModel",
    "minicpmv4_7": "MiniCPMV4_7VisionModel",
    "minimax_m3_vl": "MiniMaxM3VLVisionModel",
    "mlcd": "MLCDVisionModel",
    "mllama": "MllamaVisionModel",
    "mobilevit": "MobileViTModel",
    "mobilevitv2": "MobileViTV2Model",
    "molmo2": "Molmo2VisionModel",
    "muse_glimmer": "MuseGlimmerVisionModel",
    "muse_spark": "MuseSparkVisionModel",
    "ovis2": "Ovis2VisionModel",
    "owlv2": "Owlv2VisionTransformer Owlv2VisionModel",
    "owlvit": "OwlViTVisionTransformer OwlViTVisionModel",
    "paddleocr_vl": "PaddleOCRVisionTransformer PaddleOCRVisionModel",
    "pe_audio_video": "PeAudioVideoEncoder",
    "pe_video": "PeVideoEncoder",
    "phi4_multimodal": "Phi4MultimodalVisionModel",
    "pix2struct": "Pix2StructVisionModel",
    "pixio": "PixioModel PixioBackbone",
    "pixtral": "PixtralVisionModel",
    "pp_formulanet": "PPFormulaNetVisionModel",
    "pvt": "PvtModel",
    "pvt_v2": "PvtV2Model PvtV2Backbone",
    "qianfan_ocr": "QianfanOCRVisionModel",
    "qwen2_5_omni": "Qwen2_5OmniVisionEncoder",
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen2_vl": "Qwen2VisionTransformerPretrainedModel",
    "qwen3_5": "Qwen3_5VisionModel",
    "qwen3_5_moe": "Qwen3_5MoeVisionModel",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionEncoder",
    "qwen3_vl": "Qwen3VLVisionModel",
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
    "qwen4_exp": "Qwen4ExpVisionModel",
    "radio": "RadioModel",
    "rf_detr": "RfDetrDinov2Backbone",
    "sam": "SamVisionEncoder SamVisionModel SamModel",
    "sam2": "Sam2HieraDetModel Sam2VisionModel Sam2Model",
    "sam3": "Sam3ViTModel Sam3VisionModel",
    "sam3_tracker": "Sam3TrackerModel",
    "sam_hq": "SamHQVisionEncoder SamHQVisionModel SamHQModel",
    "sapiens2": "Sapiens2Model Sapiens2Backbone",
    "segformer": "SegformerModel",
    "seggpt": "SegGptModel",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "slanext": "SLANeXtVisionEncoder",
    "smolvlm": "SmolVLMVisionTransformer",
    "step3p7": "Step3p7VisionModel",
    "swiftformer": "SwiftFormerModel",
    "swin": "SwinModel SwinBackbone",
    "swin2sr": "Swin2SRModel",
    "swinv2": "Swinv2Model Swinv2Backbone",
    "table_transformer": "TableTransformerModel",
    "timesformer": "TimesformerModel",
    "timm_wrapper": "TimmWrapperModel",
    "tipsv2": "Tipsv2VisionEncoder Tipsv2VisionModel Tipsv2VisionBackbone",
    "unlimited_ocr": "UnlimitedOcrSamVisionEncoder UnlimitedOcrVisionEncoder UnlimitedOcrVisionModel",
    "video_llama_3": "VideoLlama3VisionModel",
    "videomae": "VideoMAEModel",
    "videoprism": "VideoPrismVisionModel VideoPrismVideoModel",
    "vit": "ViTModel",
    "vit_mae": "ViTMAEModel",
    "vit_msn": "ViTMSNModel",
    "vitdet": "VitDetModel VitDetBackbone",
    "vitpose_backbone": "VitPoseBackbone",
    "vivit": "VivitModel",
    "vjepa2": "VJEPA2Model",
    "x_clip": "XCLIPVisionModel",
    "yolos": "YolosModel",
}


_IMAGES = inputs.images()


@dataclass(frozen=True)
class Case:
    """Describes a small model of one class and its inputs.

    Attributes:
        config: Fields of the config that the rules of `small_config` get wrong.
        inputs: What it is called with.
        layers: The blocks to adapt; None for all. Only those count that the output depends on.
        beside: Images that run with each image that should be alone, where the model itself computes an image without
            padding differently (Phi-4 attends causally then).
    """

    config: dict[str, Any] = field(default_factory=dict)
    inputs: inputs.Inputs = _IMAGES
    layers: Sequence[int] | None = None
    beside: tuple[int, ...] = ()


_PACKED = inputs.packed()
_PACKED_PAIRS = inputs.packed(temporal=2)
_FLAT_PATCH = (3, PATCH, PATCH)
_SWIN = {"image_size": 32, "patch_size": 4, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4]}
_DEEPSTACK = {"deepstack_visual_indexes": [1, 2]}
_SAM_PARTS = {
    "vision_config__output_channels": 32,
    "vision_config__num_pos_feats": 16,
    "prompt_encoder_config__hidden_size": 32,
    "prompt_encoder_config__image_embedding_size": SIZE // PATCH,
    "mask_decoder_config__hidden_size": 32,
    "mask_decoder_config__mlp_dim": 32,
}
_HIERA_DET = {
    "hidden_size": 16,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "global_attention_blocks": [3],
}
_SAM2 = {
    **{f"backbone_config__{name}": value for name, value in _HIERA_DET.items()},
    "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 32,
}

_PE = {"architecture": "vit_pe_core_tiny_patch16_384", "num_classes": 32, "model_args": {"img_size": 32, "depth": 3}}

CASES: dict[str, Case] = {
    "BridgeTowerVisionModel": Case({"stop_gradient": False}, inputs.named_images("image")),
    "CohereCompassVisionModel": Case(_DEEPSTACK, _PACKED_PAIRS),
    "Cosmos3EdgeVisionModel": Case({}, _PACKED),
    "CvtModel": Case({"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}),
    "DeepseekOcr2VisionEncoder": Case({}, inputs.tokens(8, WIDTH, num_patches=4)),
    "DeepseekOcr2VisionModel": Case({"sam_config__downsample_channels": [32, WIDTH]}),
    "Dots3NoteVisionModel": Case(
        {"mlp_layer_types": ["dense"] * DEPTH, "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH}, _PACKED
    ),
    "Ernie4_5_VLMoeVisionTransformerPretrainedModel": Case({}, _PACKED),
    "Ernie4_5_VL_MoeVisionTransformerPretrainedModel": Case({}, _PACKED),
    "Exaone4_5_VisionModel": Case({"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}, _PACKED_PAIRS),
    "Florence2VisionBackbone": Case(
        {"embed_dim": [16, 32, 64, 128], "num_heads": [1, 2, 4, 8], "num_groups": [1, 2, 4, 8], "window_size": 4},
        inputs.images(64),
    ),
    "Gemma4VisionModel": Case({"pooling_kernel_size": 2}, inputs.positions),
    "Glm4vVisionModel": Case({}, _PACKED_PAIRS),
    "Glm4vMoeVisionModel": Case({}, _PACKED_PAIRS),
    "Glm5NextVisionModel": Case({}, _PACKED_PAIRS),
    "GlmImageVisionModel": Case({}, _PACKED),
    "GlmOcrVisionModel": Case({}, _PACKED_PAIRS),
    "HunYuanVLVisionTransformer": Case({"max_image_size": SIZE}, _PACKED),
    "Idefics2VisionTransformer": Case({}, inputs.canvas),
    "Idefics3VisionTransformer": Case({}, inputs.canvas),
    "Inkling2VisionModel": Case({}, inputs.merged_patches),
    "InklingVisionModel": Case({}, inputs.images()),
    "Kimi_K25VisionModel": Case({}, inputs.packed(patch=_FLAT_PATCH)),
    "Kosmos2_5VisionEncoder": Case({}, inputs.padded_tokens),
    "Kosmos2_5VisionModel": Case({"patch_embed_hidden_size": 48}, inputs.flattened(48)),
    "LevitModel": Case({"image_size": 64, "patch_size": 16}, inputs.images(64)),
    "Lfm3VlVisionModel": Case({}, _PACKED_PAIRS),
    "LwDetrViTBackbone": Case({"image_size": 64, "num_windows": 4, "window_block_indices": [0, 2]}, inputs.images(64)),
    "Llama4VisionModel": Case(
        {"intermediate_size": 4 * WIDTH, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH}
    ),
    "MiniCPMOcrVisionModel": Case({"insert_layer_id": 1}, inputs.strip),
    "MiniCPMV4_6VisionModel": Case({"insert_layer_id": 1}, inputs.strip),
    "MiniCPMV4_7VisionModel": Case({"insert_layer_id": 1}, inputs.strip),
    "MiniMaxM3VLVisionModel": Case({}, _PACKED_PAIRS),
    "MllamaVisionModel": Case({"num_global_layers": 1, "intermediate_layers_indices": [0, 2]}, inputs.tiles),
    "MobileViTModel": Case({"image_size": 64, "patch_size": 2}, inputs.images(64)),
    "MobileViTV2Model": Case({"image_size": 64, "patch_size": 2}, inputs.images(64)),
    "Molmo2VisionModel": Case({}, inputs.tokens((SIZE // PATCH) ** 2, 3 * PATCH * PATCH)),
    "MuseGlimmerVisionModel": Case({}, _PACKED_PAIRS),
    "MuseSparkVisionModel": Case({}, _PACKED_PAIRS),
    "PaddleOCRVisionModel": Case({}, inputs.packed(patch=_FLAT_PATCH, axes=1)),
    "PaddleOCRVisionTransformer": Case({}, inputs.packed(patch=_FLAT_PATCH, axes=1)),
    "PeAudioVideoEncoder": Case(
        {"video_config__vision_config": _PE}, inputs.audio_and_video),
    "PeVideoEncoder": Case({"vision_config": _PE}, inputs.videos()),
    "Phi4MultimodalVisionModel": Case({}, inputs.canvas, beside=(3, 4)),
    "Pix2StructVisionModel": Case({"patch_embed_hidden_size": 48}, inputs.flattened(48)),
    "PixtralVisionModel": Case({}, inputs.packed_sizes),
    "PPFormulaNetVisionModel": Case({"post_conv_in_channels": WIDTH}),
    "Qwen2_5OmniVisionEncoder": Case({"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}, _PACKED_PAIRS),
    "Qwen2_5_VisionTransformerPretrainedModel": Case(
        {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}, _PACKED_PAIRS
    ),
    "Qwen2VisionTransformerPretrainedModel": Case({}, _PACKED_PAIRS),
    "Qwen3_5VisionModel": Case({}, _PACKED_PAIRS),
    "Qwen3_5MoeVisionModel": Case({}, _PACKED_PAIRS),
    "Qwen3OmniMoeVisionEncoder": Case(_DEEPSTACK, _PACKED_PAIRS),
    "Qwen3VLVisionModel": Case(_DEEPSTACK, _PACKED_PAIRS),
    "Qwen3VLMoeVisionModel": Case(_DEEPSTACK, _PACKED_PAIRS),
    "Qwen4ExpVisionModel": Case({}, _PACKED_PAIRS),
    "RfDetrDinov2Backbone": Case({"num_windows": 4}),
    "SamModel": Case(_SAM_PARTS),
    "SamHQModel": Case({**_SAM_PARTS, "mask_decoder_config__vit_dim": WIDTH}),
    "Sam2HieraDetModel": Case(_HIERA_DET, inputs.images(64)),
    "Sam2VisionModel": Case(_SAM2, inputs.images(64)),
    "Sam2Model": Case(
        {**{f"vision_config__{name}": value for name, value in _SAM2.items()}, **_SAM_PARTS}, inputs.images(64)
    ),
    "Sam3TrackerModel": Case(
        {
            **{name: value for name, value in _SAM_PARTS.items() if not name.startswith("vision_config")},
            "vision_config__backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "vision_config__fpn_hidden_size": 32,
        }
    ),
    "SegGptModel": Case({"image_size": [2 * SIZE, SIZE], "merge_index": 1}, inputs.prompted),
    "Siglip2VisionModel": Case({}, inputs.padded),
    "SmolVLMVisionTransformer": Case({}, inputs.canvas),
    "Step3p7VisionModel": Case({}, inputs.images()),
    "Tipsv2VisionEncoder": Case({}, inputs.tokens(5, WIDTH)),
    "Swin2SRModel": Case({**_SWIN, "image_size": 16, "patch_size": 1, "embed_dim": 32}, inputs.images(16)),
    "TimesformerModel": Case({"num_frames": inputs.FRAMES}, inputs.videos()),
    "TimmWrapperModel": Case({"architecture": "test_vit"}, inputs.images(160)),
    "UnlimitedOcrVisionEncoder": Case({}, inputs.tokens(WIDTH, 4, 4)),
    "UnlimitedOcrVisionModel": Case({"sam_config__downsample_channels": [32, WIDTH]}),
    "VideoLlama3VisionModel": Case(
        {}, inputs.packed(merge_sizes=lambda count: torch.full((count,), 2))
    ),
    "VideoMAEModel": Case({"num_frames": inputs.FRAMES}, inputs.videos()),
    "VideoPrismVisionModel": Case({"num_frames": inputs.FRAMES}, inputs.videos()),
    "VideoPrismVideoModel": Case({"num_frames": inputs.FRAMES}, inputs.videos()),
    "ViTMAEModel": Case({}, inputs.masked),
    "VivitModel": Case({"num_frames": inputs.FRAMES, "tubelet_size": [2, PATCH, PATCH]}, inputs.videos()),
    "VJEPA2Model": Case({"frames_per_clip": inputs.FRAMES}, inputs.videos()),
    "XCLIPVisionModel": Case({"num_frames": 1}),
    **dict.fromkeys(("DonutSwinModel", "MaskFormerSwinModel", "SwinModel", "Swinv2Model"), Case(_SWIN)),
    **dict.fromkeys(("MaskFormerSwinBackbone", "SwinBackbone", "Swinv2Backbone"), Case(_SWIN)),
}  # fmt: skip


def all_cases() -> dict[str, tuple[str, str | None, Case]]:
    """Return folder, file and case of every class, by class name."""
    found: dict[str, tuple[str, str | None, Case]] = {}
    for place, names in CLASSES.items():
        folder, _, file = place.partition("/")
        for name in names.split():
            found[name] = (folder, file or None, CASES.get(name, Case()))
    return found


def build(name: str) -> nn.Module:
    """Build a small model of a class with random weights."""
    folder, file, case = all_cases()[name]
    kind = load_class(folder, name, file)
    torch.manual_seed(0)
    return kind(small_config(kind.config_class, **case.config)).eval()
