"""What is known of multimodal LLMs: where the tower is, and how images reach it. Data, not code."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from covft.adapters.registry import describe
from covft.adapters.spec import Adapter
from covft.errors import CoVFTError, UnsupportedViTError

Layout = Literal["plain", "anyres", "padded"]


@dataclass(frozen=True)
class MLLMFamily:
    """How a multimodal LLM of transformers calls its tower.

    Attributes:
        tower: Attribute of the base model that holds the tower.
        layout: How images become rows of the tower's batch. `"plain"`: each entry of `pixel_values` is one,
            and all have equally many placeholders. `"anyres"`: each image is cut into tiles, as many as its
            `image_sizes` entry says. `"padded"`: `(rows, images, 3, H, W)`, images of zeros left out.
    """

    tower: str = "vision_tower"
    layout: Layout = "plain"


FAMILIES: dict[str, MLLMFamily] = {
    "gemma3": MLLMFamily(),
    "idefics3": MLLMFamily("vision_model", "padded"),
    "internvl": MLLMFamily(),
    "llava": MLLMFamily(),
    "llava_next": MLLMFamily(layout="anyres"),
    "llava_next_video": MLLMFamily(layout="anyres"),
    "llava_onevision": MLLMFamily(layout="anyres"),
    "paligemma": MLLMFamily(),
    "smolvlm": MLLMFamily("vision_model", "padded"),
}
# Where towers of models outside the table are, the likeliest first.
_TOWER_NAMES = ("vision_tower", "vision_model", "vision_encoder", "visual")
# Arguments of towers that take all images of a batch as one sequence of patches.
_PACKED_ARGUMENTS = ("grid_thw", "image_grid_thw", "cu_seqlens", "image_sizes")


def find_tower(model: nn.Module, adapter: Adapter | None = None) -> tuple[nn.Module, MLLMFamily]:
    """The tower of a multimodal LLM, and how images reach it.

    Args:
        model: A multimodal LLM of transformers, with or without its language modelling head.
        adapter: How the tower is built, if no registered adapter knows it.

    Raises:
        UnsupportedViTError: If it has no tower that attach can serve.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        inner = " (attach before distributing)" if hasattr(model, "module") else ""
        raise UnsupportedViTError(
            f"{type(model).__name__} is no model of transformers{inner}.",
            expected="a multimodal LLM of transformers, such as LlavaForConditionalGeneration",
            got=type(model).__name__,
            fix="covft.wrap(model.vision_tower, text_encoder), and `with encoder.condition(texts):` around calls",
        )
    base: Any = getattr(model, "base_model", model)
    family = FAMILIES.get(kind)
    if family is None or not isinstance(getattr(base, family.tower, None), nn.Module):
        family = _by_structure(model, base, kind)
    tower = getattr(base, family.tower)
    _check(model, tower, adapter)
    return tower, family


def _by_structure(model: nn.Module, base: Any, kind: str) -> MLLMFamily:
    names = [name for name in _TOWER_NAMES if isinstance(getattr(base, name, None), nn.Module)]
    if not names or not hasattr(base, "get_image_features"):
        raise UnsupportedViTError(
            f"{type(model).__name__} has no vision tower that attach can find.",
            expected=f"a base model with get_image_features() and one of: {', '.join(_TOWER_NAMES)}",
            got=f"model_type {kind!r} with {', '.join(name for name, _ in base.named_children())}",
            fix="covft.wrap(tower, text_encoder), and `with encoder.condition(texts):` around calls",
        )
    return MLLMFamily(names[0])


def _check(model: nn.Module, tower: nn.Module, adapter: Adapter | None) -> None:
    arguments = inspect.signature(tower.forward).parameters
    if packed := [name for name in _PACKED_ARGUMENTS if name in arguments]:
        raise UnsupportedViTError(
            f"The tower of {type(model).__name__} sees all images of a batch as one sequence.",
            expected="a tower with a batch of images, (B, 3, H, W)",
            got=f"{type(tower).__name__}, which takes {', '.join(packed)}",
            fix="a model with a batch of images: LLaVA, LLaVA-NeXT, LLaVA-OneVision, InternVL, Gemma 3, SmolVLM",
        )
    try:
        describe(tower, adapter)
    except CoVFTError as error:
        raise UnsupportedViTError(
            f"The tower of {type(model).__name__} is a {type(tower).__name__}, which covft cannot wrap.",
            expected="a vision transformer that covft.describe knows",
            got=error.problem,
        ) from error
