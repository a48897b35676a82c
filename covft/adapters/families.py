"""The built-in ViT families, as data."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from covft.adapters.discovery import find_blocks, why_none
from covft.adapters.input_format import InputFormat, lookup
from covft.adapters.spec import ViTSpec, class_names
from covft.errors import UnknownViTError, UnsupportedViTError
from covft.utils.arguments import check_kinds

# Attributes of models with a text side.
_TEXT_SIDE = (
    "text_model",
    "language_model",
    "lm_head",
    "token_embedding",
    "text",
    "text_decoder",
    "logit_scale",
)
# Arguments of towers that take all images of a batch as one sequence of patches.
_PACKED_ARGUMENTS = ("grid_thw", "image_grid_thw", "cu_seqlens", "image_sizes")
_TEXT_CLASS = re.compile(r"Text(Model|Transformer|Encoder|Tower)|CausalLM")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ViTFamily:
    """An adapter that consists of data.

    Attributes:
        name: Name of the family; unique in the registry.
        classes: Qualified class names, such as `timm.models.eva.Eva`; subclasses match too. A name that ends in a dot
            matches every class in that package.
        library: Name of the library in tables and messages.
        blocks: Dotted path of the list of blocks; None finds it by structure.
        mlp: Attribute of a block that holds its FFN, or several, of which a block has some, with an index each; None
            finds it by structure.
        block_class: Class name of the blocks, where neither a path nor structure identifies them.
        folded: Attributes of the FFNs that see an image as several consecutive rows, such as its windows.
        prefix_tokens: Number of tokens before the patches: a sum of numbers and dotted attributes of the model.
        input: Format of the model's input; its `prefix_tokens` are those above.
        refused: Why these models cannot be wrapped, and the nearest model that can; None if they can be.

    Example:
        >>> ViTFamily(name="mine", classes=("mylib.vit.ViT",), library="mylib", blocks="layers").name
        'mine'
    """

    name: str
    classes: tuple[str, ...]
    library: str
    blocks: str | None = None
    mlp: str | tuple[str, ...] | None = None
    block_class: str | None = None
    folded: tuple[str, ...] = ()
    prefix_tokens: tuple[int | str, ...] = ()
    input: InputFormat = field(default_factory=InputFormat)
    refused: tuple[str, str] | None = None

    def matches(self, vit: nn.Module) -> bool:
        """Return whether the model's class is one of `classes` or a subclass."""
        known = [name for name in self.classes if not name.endswith(".")]
        packages = tuple(name for name in self.classes if name.endswith("."))
        return any(name in known or name.startswith(packages) for name in class_names(vit))

    def describe(self, vit: nn.Module) -> ViTSpec:
        """Find blocks, FFNs and norms, without running or changing the model.

        Raises:
            UnknownViTError: If the model has a text side, or no transformer blocks.
            UnsupportedViTError: If it packs images into one sequence without a known start of each, or is `refused`.
        """
        if self.refused is not None:
            reason, nearest = self.refused
            raise UnsupportedViTError(f"{type(vit).__name__} cannot be wrapped: {reason}.", fix=nearest)
        if _TEXT_CLASS.search(type(vit).__name__):
            raise UnknownViTError(
                f"{type(vit).__name__} is a text model.",
                expected="a vision transformer",
                fix="covft.wrap(vision_tower, text_model): the ViT comes first",
            )
        sides = [name for name in _TEXT_SIDE if hasattr(vit, name)]
        if sides:
            raise UnknownViTError(
                f"{type(vit).__name__} is more than a vision tower.",
                expected="the vision tower alone",
                got=f"a model with {', '.join(sides)}",
                fix="covft.wrap(model.vision_model, ...), or model.visual, model.vision_tower",
            )
        blocks = find_blocks(
            vit, self.blocks, self.mlp, block_class=self.block_class, folded=self.folded, packing=self.input.layout
        )
        if not blocks:
            reason, nearest = why_none(vit)
            raise UnknownViTError(
                f"{type(vit).__name__} has no transformer blocks with an FFN: {reason}.",
                expected="a list of blocks, each with an attention and a feed-forward child module",
                got=", ".join(name for name, _ in vit.named_children()) or "no child modules",
                fix=f"{nearest}; or adapter=ViTFamily(blocks='path.of.the.blocks', mlp='name_of_the_ffn', ...)",
            )
        prefix = self._prefix(vit)
        self._check_packing(vit)
        packed = self.input.is_packed
        return ViTSpec(
            library=self.library,
            class_name=type(vit).__name__,
            blocks=blocks,
            input=self.input.resolved(vit, prefix),
            image_size=None if packed else _image_size(vit),
            num_tokens=None if packed else _num_tokens(vit, prefix),
        )

    def _check_packing(self, vit: nn.Module) -> None:
        arguments = inspect.signature(vit.forward).parameters
        found = [name for name in _PACKED_ARGUMENTS if name in arguments]
        layout, sizes = self.input.layout, self.input.sizes_argument
        known = sizes in arguments and layout != "BND"
        plain = sizes is None and layout == "BND" and not found
        if not (known or plain):
            raise UnsupportedViTError(
                f"{type(vit).__name__} sees all images of a batch as one sequence, in a way that covft does not know.",
                expected="an argument that has the sides of each image, whose product is its number of tokens",
                got=f"{', '.join(found) or 'none'}; layout={layout!r}, sizes_argument={sizes!r}",
                fix="adapter=ViTFamily(..., input=InputFormat(layout='TD', sizes_argument='grid_thw')), if the tokens "
                "of each image are together at the FFNs",
            )

    def _prefix(self, vit: nn.Module) -> int | None:
        parts = [p if isinstance(p, int) else lookup(vit, p) for p in self.prefix_tokens]
        return None if any(part is None for part in parts) or not parts else sum(parts)


def _first(root: Any, *paths: str) -> Any:
    return next((value for path in paths if (value := lookup(root, path)) is not None), None)


def _side(value: Any) -> int | None:
    if isinstance(value, tuple | list):
        return int(value[0]) if len(value) == 2 and value[0] == value[1] else None
    return int(value) if isinstance(value, int) else None


def _image_size(vit: nn.Module) -> int | None:
    return _side(_first(vit, "config.image_size", "patch_embed.img_size", "trunk.patch_embed.img_size", "image_size"))


def _num_tokens(vit: nn.Module, prefix: int | None) -> int | None:
    patches = _first(vit, "patch_embed.num_patches", "trunk.patch_embed.num_patches")
    if patches is None:
        size, patch = _image_size(vit), _side(_first(vit, "config.patch_size", "patch_size"))
        patches = None if size is None or not patch else (size // patch) ** 2
    grid = lookup(vit, "grid_size")
    if grid is not None:
        patches = math.prod(grid)
    return None if patches is None or prefix is None else int(patches) + prefix


def _timm(name: str, *classes: str, **known: Any) -> ViTFamily:
    return ViTFamily(
        name=f"timm/{name}",
        classes=tuple(f"timm.models.{cls}" for cls in classes),
        library="timm",
        prefix_tokens=("num_prefix_tokens",),
        **known,
    )


def _hf(model: str, *classes: str, prefix: tuple[int | str, ...], mask: str | None = None, **known: Any) -> ViTFamily:
    module = f"transformers.models.{model}.modeling_{model}"
    return ViTFamily(
        name=f"transformers/{model}",
        classes=tuple(f"{module}.{cls}" for cls in classes),
        library="transformers",
        prefix_tokens=prefix,
        input=InputFormat(mask_argument=mask, **known),
    )


def _packed(
    model: str, *classes: str, layout: str = "TD", sizes: str = "grid_thw", prefix: int = 0, **known: Any
) -> ViTFamily:
    return _hf(model, *classes, prefix=(prefix,), layout=layout, sizes_argument=sizes, **known)


FAMILIES: tuple[ViTFamily, ...] = (
    ViTFamily(
        name="timm/vision_transformer",
        classes=(
            "timm.models.vision_transformer.VisionTransformer",
            "timm.models.eva.Eva",
            "timm.models.beit.Beit",
        ),
        library="timm",
        blocks="blocks",
        mlp=("mlp", "ffns.0.mlp", "ffns.1.mlp"),  # the latter two where a block has two of each, side by side
        prefix_tokens=("num_prefix_tokens",),
    ),
    ViTFamily(
        name="open_clip/vision_transformer",
        classes=("open_clip.transformer.VisionTransformer",),
        library="open_clip",
        blocks="transformer.resblocks",
        mlp="mlp",
        prefix_tokens=(1,),
    ),
    ViTFamily(
        name="open_clip/timm",
        classes=("open_clip.timm_model.TimmModel",),
        library="open_clip",
        prefix_tokens=("trunk.num_prefix_tokens",),
    ),
    # Padded: the mask covers only patches.
    _timm(
        "naflex",
        "naflexvit.NaFlexVit",
        "gemma4_vit.Gemma4VitEncoder",
        "gemma4_vit.Gemma4VitClassifier",
        input=InputFormat(mask_argument="patch_valid"),
    ),
    # Each pixel of a patch, and each position within patches, is a row.
    _timm("tnt", "tnt.TNT", blocks="blocks", mlp=("mlp_in", "mlp"), folded=("mlp_in",)),
    _timm("byobnet", "byobnet.ByobNet", folded=("mlp",)),
    _timm(
        "efficientvit_msra",
        "efficientvit_msra.EfficientVitMsra",
        block_class="EfficientVitBlock",
        mlp=("ffn0.m", "ffn1.m"),
    ),
    # Attention and FFN are items of one list.
    _timm("iformer", "iformer.IFormer", block_class="FFN", mlp="mixer.module"),
    _hf("clip", "CLIPVisionModel", "CLIPVisionModelWithProjection", prefix=(1,)),
    _hf("siglip", "SiglipVisionModel", prefix=(0,)),
    _hf("siglip2", "Siglip2VisionModel", prefix=(0,), mask="pixel_attention_mask"),
    _hf("dinov2", "Dinov2Model", prefix=(1,)),
    _hf("dinov2_with_registers", "Dinov2WithRegistersModel", prefix=(1, "config.num_register_tokens")),
    _hf("dinov3_vit", "DINOv3ViTModel", prefix=(1, "config.num_register_tokens")),
    _hf("internvl", "InternVLVisionModel", prefix=(1,)),
    _hf("vit", "ViTModel", prefix=(1,)),
    _hf("mllama", "MllamaVisionModel", prefix=(), mask="aspect_ratio_mask", mask_unit="num_patches", image_axes=2),
    # Padded.
    _hf("idefics2", "Idefics2VisionTransformer", prefix=(0,), mask="patch_attention_mask"),
    _hf("idefics3", "Idefics3VisionTransformer", prefix=(0,), mask="patch_attention_mask"),
    _hf("kosmos2_5", "Kosmos2_5VisionEncoder", prefix=(0,), mask="attention_mask"),
    _hf("phi4_multimodal", "Phi4MultimodalVisionModel", prefix=(0,), mask="patch_attention_mask"),
    _hf("smolvlm", "SmolVLMVisionTransformer", prefix=(0,), mask="patch_attention_mask"),
    # -1: row and column of a padding patch.
    _hf("gemma4", "Gemma4VisionModel", prefix=(0,), mask="pixel_position_ids", mask_padding=-1),
    # The mask is optional: a patch begins with its row and column, from 1, followed by its pixels.
    replace(
        _hf("kosmos2_5", "Kosmos2_5VisionModel", prefix=(0,), mask="flattened_patches", mask_padding=0),
        name="transformers/kosmos2_5/model",
    ),
    _hf("pix2struct", "Pix2StructVisionModel", prefix=(0,), mask="flattened_patches", mask_padding=0),
    # Packed.
    _packed("cohere_compass", "CohereCompassVisionModel"),
    _packed("cosmos3_edge", "Cosmos3EdgeVisionModel"),
    _packed("dots3_note", "Dots3NoteVisionModel"),
    _packed("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel"),
    _packed("exaone4_5", "Exaone4_5_VisionModel"),
    _packed("glm4v", "Glm4vVisionModel"),
    _packed("glm4v_moe", "Glm4vMoeVisionModel"),
    _packed("glm5_next", "Glm5NextVisionModel"),
    _packed("glm_image", "GlmImageVisionModel"),
    _packed("glm_ocr", "GlmOcrVisionModel"),
    _packed("hunyuan_vl", "HunYuanVLVisionTransformer", layout="1TD"),
    _packed(
        "inkling2",
        "Inkling2VisionModel",
        sizes="image_grid_thw",
        prefix=1,
        sizes_square="config.spatial_merge_size",
    ),
    _packed("kimi_k25", "Kimi_K25VisionModel"),
    _packed("lfm3_vl", "Lfm3VlVisionModel"),
    _packed("minicpm_ocr", "MiniCPMOcrVisionModel", layout="1TD", sizes="target_sizes", merges=True),
    _packed("minicpmv4_6", "MiniCPMV4_6VisionModel", layout="1TD", sizes="target_sizes", merges=True),
    _packed("minicpmv4_7", "MiniCPMV4_7VisionModel", layout="1TD", sizes="target_sizes", merges=True),
    _packed("minimax_m3_vl", "MiniMaxM3VLVisionModel", layout="1TD"),
    _packed("muse_glimmer", "MuseGlimmerVisionModel"),
    _packed("muse_spark", "MuseSparkVisionModel"),
    _packed("paddleocr_vl", "PaddleOCRVisionTransformer", "PaddleOCRVisionModel"),
    _packed("pixtral", "PixtralVisionModel", layout="1TD", sizes="image_sizes", sizes_unit="config.patch_size"),
    _packed("qwen2_5_omni", "Qwen2_5OmniVisionEncoder"),
    _packed("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
    _packed("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
    _packed("qwen3_5", "Qwen3_5VisionModel"),
    _packed("qwen3_5_moe", "Qwen3_5MoeVisionModel"),
    _packed("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder"),
    _packed("qwen3_vl", "Qwen3VLVisionModel"),
    _packed("qwen3_vl_moe", "Qwen3VLMoeVisionModel"),
    _packed("qwen4_exp", "Qwen4ExpVisionModel"),
    _packed("video_llama_3", "VideoLlama3VisionModel"),
    # Each frame, window or pixel position of an image is a row.
    *(
        replace(_hf(model, *classes, prefix=()), folded=("intermediate", "mlp"))
        for model, classes in {
            "mobilevit": ("MobileViTModel",),
            "pe_audio_video": ("PeAudioVideoEncoder",),
            "pe_video": ("PeVideoEncoder",),
            "rf_detr": ("RfDetrDinov2Backbone",),
            "lw_detr": ("LwDetrViTBackbone",),
            "videoprism": ("VideoPrismVisionModel", "VideoPrismVideoModel"),
        }.items()
    ),
    # Models that cannot be wrapped.
    *(
        replace(_hf(model, cls, prefix=()), refused=(reason, nearest))
        for model, cls, reason, nearest in (
            (
                "bridgetower",
                "BridgeTowerVisionModel",
                "its blocks call the parts of their FFN one by one",
                "a CLIP tower, from which it is made: transformers.CLIPVisionModel",
            ),
            (
                "levit",
                "LevitModel",
                "attention and FFN are items of one list, so there are no blocks",
                "the same model of timm, such as timm.create_model('levit_256')",
            ),
            (
                "seggpt",
                "SegGptModel",
                "images and their examples are rows of one batch, all examples after all images",
                "a ViT of images alone, such as transformers.ViTModel",
            ),
            (
                "table_transformer",
                "TableTransformerModel",
                "it is a convnet, and the layers after it have no FFN module",
                "a ViT, such as transformers.ViTModel",
            ),
        )
    ),
    # The vision towers of segmentation models.
    *(
        replace(_hf(model, cls, prefix=(0,)), blocks=f"vision_encoder.{path}", mlp="mlp")
        for model, cls, path in (
            ("sam", "SamModel", "layers"),
            ("sam_hq", "SamHQModel", "layers"),
            ("sam2", "Sam2Model", "backbone.blocks"),
            ("sam3_tracker", "Sam3TrackerModel", "backbone.layers"),
        )
    ),
    ViTFamily(
        name="covft/toy",
        classes=("covft.testing.ToyViT",),
        library="covft",
        blocks="blocks",
        mlp="mlp",
        prefix_tokens=(1,),
    ),
    # All other models of these libraries: by structure, prefix tokens unknown.
    ViTFamily(name="timm", classes=("timm.models.",), library="timm", prefix_tokens=("num_prefix_tokens",)),
    ViTFamily(name="open_clip", classes=("open_clip.",), library="open_clip"),
    ViTFamily(name="transformers", classes=("transformers.models.",), library="transformers"),
)
