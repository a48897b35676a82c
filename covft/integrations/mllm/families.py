"""Describes multimodal LLMs as data: where the tower is, and how images reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from covft.adapters.registry import describe
from covft.adapters.spec import Adapter, ViTSpec
from covft.errors import CoVFTError, UnsupportedViTError
from covft.surgery.checks import check_not_copied

Layout = Literal["plain", "anyres", "padded", "grid", "sizes", "rows"]


@dataclass(frozen=True)
class MLLMFamily:
    """How a multimodal LLM of transformers calls its tower.

    Attributes:
        tower: Attribute of the base model that holds the tower.
        layout: How images become rows of the tower's batch. `"plain"`: each entry of `pixel_values` is a row,
            and all have equally many placeholders. `"anyres"`: each image is cut into tiles, whose number follows
            from its `image_sizes` entry. `"padded"`: `(rows, images, 3, H, W)`, without the images of zeros.
            Packed towers see each image as one segment, whose size is its `image_grid_thw` entry in patches
            (`"grid"`) or its `image_sizes` entry in pixels (`"sizes"`).
            `"rows"`: `(rows, images, tiles, 3, H, W)`, one text for each of `(rows, images)`, including padding.
        videos: Whether a `"grid"` model's videos have their own placeholders and are one segment each, whose size is
            its `video_grid_thw` entry.
    """

    tower: str = "vision_tower"
    layout: Layout = "plain"
    videos: bool = False


FAMILIES: dict[str, MLLMFamily] = {
    "gemma3": MLLMFamily(),
    "glm4v": MLLMFamily("visual", "grid"),
    "idefics3": MLLMFamily("vision_model", "padded"),
    "internvl": MLLMFamily(),
    "llava": MLLMFamily(),
    "llava_next": MLLMFamily(layout="anyres"),
    "llava_next_video": MLLMFamily(layout="anyres"),
    "llava_onevision": MLLMFamily(layout="anyres"),
    "mistral3": MLLMFamily(layout="sizes"),
    "mllama": MLLMFamily("vision_model", "rows"),
    "paligemma": MLLMFamily(),
    "qwen2_5_vl": MLLMFamily("visual", "grid", videos=True),
    "qwen2_vl": MLLMFamily("visual", "grid", videos=True),
    "qwen3_5": MLLMFamily("visual", "grid", videos=True),
    "qwen3_5_moe": MLLMFamily("visual", "grid", videos=True),
    "qwen3_vl": MLLMFamily("visual", "grid", videos=True),
    "qwen3_vl_moe": MLLMFamily("visual", "grid", videos=True),
    "smolvlm": MLLMFamily("vision_model", "padded"),
}
# Names of the modules between tower and language model; a tower may hold its own.
CONNECTORS = frozenset(
    ("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "image_newline", "mm_projector")
)
# Attributes that hold towers of models outside the table, the likeliest first.
_TOWER_NAMES = ("vision_tower", "vision_model", "vision_encoder", "visual")
# Layouts of packed towers, by the argument with the sizes of images.
_PACKED_LAYOUTS: dict[str, Layout] = {"grid_thw": "grid", "image_sizes": "sizes"}
_WRAP_FIX = "covft.wrap(tower, text_encoder), and calls inside `with encoder.condition(texts):`"


def base_of(model: nn.Module) -> Any:
    """Return a transformers model without its head, whose forward calls the tower; itself if it has no head."""
    base = getattr(model, "base_model", model)
    # Before release 5 some classes did not say which attribute it is.
    inner = getattr(model, "model", None)
    return inner if base is model and isinstance(inner, nn.Module) else base


def find_tower(model: nn.Module, adapter: Adapter | None = None) -> tuple[nn.Module, MLLMFamily]:
    """Return the tower of a multimodal LLM, and how images reach it.

    Args:
        model: A multimodal LLM of transformers, with or without its language modelling head.
        adapter: How the tower is built, if no registered adapter knows it.

    Raises:
        UnsupportedViTError: If it has no tower that attach supports.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        inner = " (attach before distributing)" if hasattr(model, "module") else ""
        raise UnsupportedViTError(
            f"{type(model).__name__} is not a model of transformers{inner}.",
            expected="a multimodal LLM of transformers, such as LlavaForConditionalGeneration",
            got=type(model).__name__,
            fix=_WRAP_FIX.replace("tower", "model.vision_tower", 1),
        )
    base = base_of(model)
    family = FAMILIES.get(kind)
    if family is None or not isinstance(getattr(base, family.tower, None), nn.Module):
        family = _by_structure(model, base, kind)
    tower = getattr(base, family.tower)
    check_not_copied(tower)
    spec = _described(model, tower, adapter)
    if spec.input.sizes_argument is not None:
        family = _of_packed(family, spec)
    return tower, family


def find_connector(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules between the tower and the language model of a multimodal LLM, by their paths; none if unknown.

    Args:
        model: A multimodal LLM of transformers.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path.rpartition(".")[2] in CONNECTORS and not inside:
            found[path] = module
    return found


def _by_structure(model: nn.Module, base: Any, kind: str) -> MLLMFamily:
    names = [name for name in _TOWER_NAMES if isinstance(getattr(base, name, None), nn.Module)]
    if not names or not hasattr(base, "get_image_features"):
        raise UnsupportedViTError(
            f"{type(model).__name__} has no vision tower that attach can find.",
            expected=f"a base model with get_image_features() and one of: {', '.join(_TOWER_NAMES)}",
            got=f"model_type {kind!r} with {', '.join(name for name, _ in base.named_children())}",
            fix=_WRAP_FIX,
        )
    return MLLMFamily(names[0])


def _of_packed(family: MLLMFamily, spec: ViTSpec) -> MLLMFamily:
    """Return the family of a model with a packed tower, such as a LLaVA with Pixtral."""
    layout = _PACKED_LAYOUTS.get(spec.input.sizes_argument or "")
    if layout is None:
        raise UnsupportedViTError(
            f"attach does not know which argument has the image sizes for {spec.input.sizes_argument}=.",
            expected=" | ".join(f"{name}=" for name in _PACKED_LAYOUTS),
            got=f"{spec.class_name}, which takes {spec.input.sizes_argument}=",
            fix=_WRAP_FIX,
        )
    return family if family.layout == layout else MLLMFamily(family.tower, layout)


def _described(model: nn.Module, tower: nn.Module, adapter: Adapter | None) -> ViTSpec:
    try:
        return describe(tower, adapter)
    except CoVFTError as error:
        raise UnsupportedViTError(
            f"The tower of {type(model).__name__} is a {type(tower).__name__}, which covft cannot wrap.",
            expected="a vision transformer that covft.describe knows",
            got=error.problem,
        ) from error
