"""The table of ViTs that the invariants run on: every family, from its real config classes, small."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from covft.utils.transformers_names import OLDEST_TRAINED
from tests.helpers.releases import found, installed

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 32, 4
TEXT_DIM = 16
# Height and width, in patches, of the images of packed towers.
GRIDS = [(4, 6), (2, 2), (4, 2)]


@dataclass(frozen=True)
class Tower:
    """How to build a ViT, and inputs for it."""

    name: str
    build: Callable[[], nn.Module]
    kwargs: dict[str, Any] = field(default_factory=dict)  # of the call, in addition to the images
    padded: bool = False
    tiled: bool = False  # (rows, images, tiles, 3, H, W)
    sizes: str | None = None  # of packed towers: the argument that has the sides of each image

    def __str__(self) -> str:
        return self.name

    def images(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.padded:
            return torch.randn(batch, 16, 3 * PATCH * PATCH, dtype=dtype)
        if self.tiled:
            return torch.randn(batch, 1, 4, 3, SIZE, SIZE, dtype=dtype)
        if self.sizes == "grid_thw":
            return torch.randn(sum(self.lengths(batch)), 3 * 2 * PATCH * PATCH, dtype=dtype)
        if self.sizes == "image_sizes":
            return torch.randn(batch, 3, 4 * PATCH, 6 * PATCH, dtype=dtype)
        return torch.randn(batch, 3, SIZE, SIZE, dtype=dtype)

    def lengths(self, batch: int) -> list[int]:
        """Tokens of each image of a packed tower."""
        return [height * width for height, width in self.grids(batch)]

    def grids(self, batch: int) -> list[tuple[int, int]]:
        return [GRIDS[i % len(GRIDS)] for i in range(batch)]

    def inputs(self, batch: int) -> dict[str, Any]:
        if self.tiled:
            tiles = torch.tensor([(2, 1, 4)[i % 3] for i in range(batch)])
            mask = (torch.arange(4) < tiles[:, None]).long()
            return {"aspect_ratio_ids": tiles[:, None], "aspect_ratio_mask": mask[:, None]}
        if self.sizes == "grid_thw":
            return {"grid_thw": torch.tensor([(1, *grid) for grid in self.grids(batch)])}
        if self.sizes == "image_sizes":
            return {"image_sizes": torch.tensor(self.grids(batch)) * PATCH}
        if not self.padded:
            return dict(self.kwargs)
        mask = torch.zeros(batch, 16, dtype=torch.int64)
        shapes = torch.tensor([[2, 3] if i % 2 else [4, 4] for i in range(batch)])
        for row, (height, width) in enumerate(shapes.tolist()):
            mask[row, : height * width] = 1
        return {"pixel_attention_mask": mask, "spatial_shapes": shapes}


def features(output: Any) -> Tensor:
    """Return the tokens or the pooled vector of a ViT's output."""
    if isinstance(output, tuple):  # Qwen3-VL's, before release 5 of transformers
        return output[0]
    return output if isinstance(output, Tensor) else output.last_hidden_state


def image_features(output: Any) -> Any:
    """What `get_image_features` of a multimodal LLM computes; before release 5 of transformers it returns no more."""
    return getattr(output, "pooler_output", output)


def body(vit: Any) -> Any:
    """The module that has the blocks; CLIP and SigLIP have it one level further down up to release 5.0 at least."""
    return getattr(vit, "vision_model", vit)


def hidden_states(vit: nn.Module) -> dict[str, bool]:
    """The option that asks for hidden states, where the ViT takes it."""
    parameters = inspect.signature(vit.forward).parameters
    named = "output_hidden_states" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"output_hidden_states": True} if named and type(vit).__module__.startswith("transformers.") else {}


def exact(tower: str) -> dict[str, float]:
    """Tolerances in float64; the attention of Pixtral was in float32 inside, in release 4.49."""
    rounding = 1e-6 if tower == "hf-pixtral" and (installed() or (0, 0)) < OLDEST_TRAINED else 1e-10
    return {"rtol": rounding, "atol": rounding}


def perturb(encoder: nn.Module, scale: float = 0.1) -> None:
    """Move experts, contexts and routers apart, so that the text matters."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "img_size": SIZE, "num_classes": 0}
        return timm.create_model(name, pretrained=False, **{**sizes, "patch_size": PATCH, **kwargs})

    return build


def _open_clip(**vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip.model import CLIP

        text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
        return CLIP(embed_dim=16, vision_cfg={"image_size": SIZE, **vision}, text_cfg=text).visual

    return build


def _hf(model: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        sizes = {
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
        }
        return found(model)(found(config)(**{**sizes, **kwargs}))

    return build


def _packed(model: str, name: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        tower = found(f"models.{model}.modeling_{model}.{name}")
        return tower(tower.config_class(patch_size=PATCH, num_heads=4, depth=DEPTH, **sizes))

    return build


def _qwen3(model: str, name: str) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH}
    return _packed(model, name, **sizes, deepstack_visual_indexes=[1, 2], num_position_embeddings=16)


TOWERS = [
    Tower("timm-clip", _timm("vit_base_patch16_clip_quickgelu_224")),
    Tower("timm-siglip", _timm("vit_base_patch16_siglip_224")),
    Tower("timm-dinov2", _timm("vit_small_patch14_reg4_dinov2")),
    Tower("timm-dinov3", _timm("vit_small_patch16_dinov3")),
    Tower("timm-deit", _timm("deit_tiny_patch16_224")),
    Tower("timm-eva02", _timm("eva02_tiny_patch14_224")),
    Tower("timm-beit", _timm("beit_base_patch16_224")),
    # Each patch is also a row of pixels; two FFNs in a block.
    Tower("timm-tnt", _timm("tnt_s_patch16_224", num_heads=None, num_heads_outer=4)),
    Tower("timm-naflex", _timm("naflexvit_base_patch16_gap", img_size=None)),
    Tower("open_clip-native", _open_clip(layers=DEPTH, width=WIDTH, head_width=8, patch_size=PATCH)),
    Tower("open_clip-timm", _open_clip(timm_model_name="test_vit", timm_pool="avg", timm_proj="linear")),
    Tower("hf-clip", _hf("CLIPVisionModel", "CLIPVisionConfig")),
    Tower("hf-clip-projection", _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=8)),
    Tower("hf-siglip", _hf("SiglipVisionModel", "SiglipVisionConfig")),
    Tower("hf-siglip2", _hf("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16), padded=True),
    Tower("hf-dinov2", _hf("Dinov2Model", "Dinov2Config")),
    Tower("hf-dinov2-swiglu", _hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True)),
    Tower("hf-dinov2-registers", _hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig")),
    Tower("hf-dinov3", _hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2)),
    Tower(
        "hf-internvl",
        _hf(
            "InternVLVisionModel",
            "InternVLVisionConfig",
            use_qk_norm=True,
            image_size=[SIZE, SIZE],
            patch_size=[PATCH, PATCH],
        ),
    ),
    Tower("hf-vit", _hf("ViTModel", "ViTConfig")),
    Tower(
        "hf-qwen2-vl",
        _packed("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2),
        sizes="grid_thw",
    ),
    Tower(
        "hf-qwen2.5-vl",  # two blocks look at windows of 4 x 4 patches, out of reading order
        _packed(
            "qwen2_5_vl",
            "Qwen2_5_VisionTransformerPretrainedModel",
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            out_hidden_size=WIDTH,
            window_size=4 * PATCH,
            fullatt_block_indexes=[1, 3],
        ),
        sizes="grid_thw",
    ),
    Tower("hf-qwen3-vl", _qwen3("qwen3_vl", "Qwen3VLVisionModel"), sizes="grid_thw"),
    Tower("hf-qwen3-vl-moe", _qwen3("qwen3_vl_moe", "Qwen3VLMoeVisionModel"), sizes="grid_thw"),
    Tower(
        "hf-glm4v",
        _packed(
            "glm4v",
            "Glm4vVisionModel",
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            out_hidden_size=WIDTH,
            image_size=SIZE,
        ),
        sizes="grid_thw",
    ),
    Tower("hf-pixtral", _hf("PixtralVisionModel", "PixtralVisionConfig", image_size=6 * PATCH), sizes="image_sizes"),
]
# Not in the table: it returns no hidden states.
MLLAMA = Tower(
    "hf-mllama",
    _hf(
        "MllamaVisionModel",
        "MllamaVisionConfig",
        num_hidden_layers=3,
        num_global_layers=1,
        intermediate_layers_indices=[0, 2],
        vision_output_dim=3 * WIDTH,
    ),
    tiled=True,
)
PACKED = [tower for tower in TOWERS if tower.sizes]
BY_NAME = {tower.name: tower for tower in (*TOWERS, MLLAMA)}
