"""A small model of every timm class that has attention: wrapped, nothing changed and all trained, or refused."""

from __future__ import annotations

import pytest
import torch

import covft
from benchmarks.coverage.check import check
from covft.errors import UnknownViTError, UnsupportedViTError

timm = pytest.importorskip("timm")

S = {"img_size": 64}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
TOWER = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}
GEMMA = {"img_size": 96, "head_dim": 16, "intermediate_size": 64, "position_embedding_size": 64}
# Class and variant: model, options, side of the images, FFNs, layouts.
WRAPPED = {
    "VisionTransformer": ("vit_base_patch16_224", SMALL, 32, 2, "BND"),
    "VisionTransformer-gated": ("vitamin_small_224", {"img_size": 64, "depth": 2}, 64, 2, "BND"),
    "VisionTransformer-parallel": ("vit_small_patch16_18x2_224", SMALL, 32, 4, "BND"),
    "VisionTransformerDistilled": ("deit_tiny_distilled_patch16_224", SMALL, 32, 2, "BND"),
    "VisionTransformerRelPos": ("test_vit_relpos", {}, 160, 9, "BND"),
    "VisionTransformerSAM": ("samvit_base_patch16", {**SMALL, "global_attn_indexes": (1,)}, 32, 2, "BND"),
    "Eva": ("eva02_tiny_patch14_224", SMALL, 32, 2, "BND"),
    "Beit": ("beit_base_patch16_224", SMALL, 32, 2, "BND"),
    "NaFlexVit": ("naflexvit_base_patch16_gap", {**SMALL, "img_size": None}, 32, 2, "BND"),
    "ConVit": ("convit_tiny", {**SMALL, "depth": 2, "local_up_to_layer": 1}, 32, 2, "BND"),
    "Cait": ("cait_xxs24_224", SMALL, 32, 4, "BND"),
    "Xcit": ("xcit_nano_12_p16_224", {**SMALL, "patch_size": 16, "img_size": 64}, 64, 4, "BND"),
    "CrossVit": ("crossvit_9_240", {"img_size": 120, "depth": ((1, 1, 0),)}, 120, 2, "BND"),
    "CoaT": ("coat_tiny", {"img_size": 64, "embed_dims": (32,) * 4, "parallel_depth": 1}, 64, 9, "BND"),
    "TNT": (
        "tnt_s_patch16_224",
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads_outer": 4},
        32,
        4,
        "BND (BP)ND",
    ),
    "VOLO": ("volo_d1_224", S, 64, 20, "BND"),
    "PoolingVisionTransformer": ("pit_ti_224", {"img_size": 64, "depth": (1, 1, 1)}, 64, 3, "BND"),
    "SwinTransformer": ("swin_tiny_patch4_window7_224", {**S, "depths": (1, 1), "window_size": 4}, 64, 2, "BND"),
    "SwinTransformerV2": ("swinv2_tiny_window8_256", {**S, "depths": (1, 1), "window_size": 4}, 64, 2, "BND"),
    "SwinTransformerV2Cr": ("swinv2_cr_tiny_224", {**S, "depths": (1, 1)}, 64, 2, "BND"),
    "Hiera": ("hiera_tiny_224", {**S, "embed_dim": 32, "stages": (1, 1, 1, 1)}, 64, 4, "BND"),
    "HieraDet": ("hieradet_small", {"embed_dim": 32, "stages": (1, 1, 1, 1), "global_att_blocks": ()}, 64, 4, "BND"),
    "MultiScaleVit": ("mvitv2_tiny", S, 64, 10, "BND"),
    "DaVit": ("davit_tiny", {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 2)}, 64, 4, "BND"),
    "Twins": ("twins_svt_small", {**S, "depths": (1, 1, 1, 2)}, 64, 5, "BND"),
    "Nest": ("nest_tiny", S, 64, 12, "BND"),
    "TinyVit": ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}, 64, 3, "BND"),
    "PyramidVisionTransformerV2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 64, 4, "BND"),
    "GlobalContextVit": ("gcvit_xxtiny", S, 64, 12, "BND"),
    "EdgeNeXt": ("edgenext_xx_small", {"depths": (1, 1, 2, 1)}, 64, 3, "BND"),
    "CSATv2": ("csatv2", {}, 64, 4, "BND"),
    "MetaFormer": ("caformer_s18", {}, 64, 12, "BND"),
    "MaxxVit": ("test_maxvit", {"img_size": 64}, 64, 8, "BND"),
    "MaxxVit-coatnet": ("test_coatnet", {"img_size": 64}, 64, 3, "BCHW"),
    "Levit": ("levit_256d", S, 64, 20, "BND"),
    "LevitDistilled": ("levit_128s", S, 64, 11, "BND"),
    "LevitDistilled-conv": ("levit_conv_128s", S, 64, 11, "BCHW"),
    "EfficientFormer": ("efficientformer_l1", {}, 224, 1, "BND"),
    "EfficientFormerV2": ("efficientformerv2_s0", S, 64, 4, "BCHW"),
    "EfficientVitMsra": ("efficientvit_m0", S, 64, 12, "BCHW"),
    "FastVit": ("fastvit_sa12", {}, 64, 2, "BCHW"),
    "IFormer": ("iformer_t", {}, 64, 5, "BCHW"),
    "LowFormer": ("lowformer_b0", {}, 64, 7, "BCHW"),
    "SHViT": ("shvit_s1", {}, 64, 9, "BCHW"),
    "SwiftFormer": ("swiftformer_xs", {}, 64, 4, "BCHW"),
    "NextViT": ("nextvit_small", {"depths": (1, 1, 5, 1)}, 64, 8, "BCHW"),
    "Visformer": ("visformer_tiny", {**S, "depth": (1, 1, 1)}, 64, 2, "BCHW"),
    "ByobNet-mobilevit": ("mobilevit_xxs", {}, 64, 9, "(BP)ND"),
    "ByobNet-mobilevitv2": ("mobilevitv2_050", {}, 64, 9, "(BP)CHW"),
    "Qwen3VitEncoder": ("qwen3_vit_306m_enc", TOWER, 64, 2, "BND"),
    "Qwen3VitClassifier": ("qwen3_vit_306m", TOWER, 64, 2, "BND"),
    "DeepseekVitEncoder": ("deepseek_vit_412m_enc", {**TOWER, "img_size": 84}, 84, 2, "BND"),
    "DeepseekVitClassifier": ("deepseek_vit_412m", {**TOWER, "img_size": 84}, 84, 2, "BND"),
    "Gemma4VitEncoder": ("gemma4_vit_167m_enc", {**TOWER, **GEMMA}, 96, 2, "BND"),
    "Gemma4VitClassifier": ("gemma4_vit_167m", {**TOWER, **GEMMA}, 96, 2, "BND"),
}
REFUSED = {
    "VisionTransformer": ("vit_base_patch16_xp_224", "ParallelScalingBlock computes attention and FFN in one"),
    "VisionTransformer-diff": ("vit_dpwee_patch16_reg1_gap_256", "DiffParallelScalingBlock computes attention and FFN"),
    "ByobNet": ("bat_resnext26ts", "BatNonLocalAttn has no FFN beside it"),
    "CPUBone": ("cpubone_nano", "ConvAttention has no FFN beside it"),
    "EfficientVit": ("efficientvit_b0", "LiteMLA has no FFN beside it"),
    "EfficientVitLarge": ("efficientvit_l1", "LiteMLA has no FFN beside it"),
    "MobileNetV3": ("mobilenetv4_hybrid_medium", "MobileAttention has no FFN beside it"),
    "MobileNetV5": ("mobilenetv5_base", "MobileAttention has no FFN beside it"),
    "MobileNetV5Encoder": ("mobilenetv5_300m_enc", "MobileAttention has no FFN beside it"),
    "LowFormer": ("lowformer_e1", "it has no attention"),
    "ConvNeXt": ("test_convnext", "it has no attention"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped(case):
    name, options, side, ffns, layouts = WRAPPED[case]
    vit = timm.create_model(name, **options)
    assert type(vit).__name__ == case.partition("-")[0]
    result = check(vit, lambda images: ((torch.randn(images, 3, side, side),), {}), name=name, library="timm")
    assert (result.verdict, result.reason) == ("wrapped", "")
    assert (result.num_blocks, " ".join(sorted(result.layouts, key=len))) == (ffns, layouts)
    assert result.missing_gradients == []


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    name, reason = REFUSED[case]
    with torch.device("meta"):
        vit = timm.create_model(name)
    assert type(vit).__name__ == case.partition("-")[0]
    before = [id(module) for module in vit.modules()]
    with pytest.raises((UnknownViTError, UnsupportedViTError), match=reason) as caught:
        covft.wrap(vit, 16)
    assert caught.value.fix
    assert [id(module) for module in vit.modules()] == before
