"""What a method costs, in a ViT alone or in a multimodal LLM."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from covft.integrations.mllm.attach import get_encoder
from covft.integrations.mllm.attachment import without_peft
from covft.integrations.mllm.families import base_of, find_tower
from covft.integrations.tuning.tune import is_mllm, tune
from covft.tuning.budget import Budget, measured, text_for, twin_of
from covft.tuning.budget import budget as budget_of_vit
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.parameters import count


@check_kinds
def budget(model: nn.Module, method: str, *, text_dim: int = 768, **options: Any) -> Budget:
    """Return what a method would cost, on a twin without values: nothing is built, the model is not changed.

    FLOPs and bytes are counted in runs of the twin, for one image. They are None where its size is not known, and for
    packed, padded and tiled images. Bytes are those with fused attention, as `scaled_dot_product_attention` has it on
    CPUs and GPUs; inside an `nn.MultiheadAttention` (open_clip) the attention's weights are counted, too. A method that
    reads the tokens of the text is given one of 16 tokens.

    Args:
        model: A ViT; or a multimodal LLM, of which tower and connector are run, and what the method trains is counted.
        method: Name of a method.
        text_dim: Width C of the text features, for methods that read text.
        **options: Options of the method.

    Raises:
        CoVFTError: As `covft.tune` does.

    Example:
        >>> import timm
        >>> budget(timm.create_model("test_vit"), "lora", r=4).parameters
        21504
    """
    if not is_mllm(model):
        return budget_of_vit(model, method, text_dim=text_dim, **options)
    check_sizes(text_dim=text_dim)
    plain, twin = twin_of(without_peft(model)), twin_of(without_peft(model))
    total = count(twin.parameters())
    with torch.device("meta"):
        tune(twin, method, text_encoder=text_dim, **options)
    encoder, images, cost = get_encoder(twin), _image_of(plain), (None, None, None)

    def run() -> Tensor:
        text = text_for(encoder, text_dim)
        with encoder.condition(text) if encoder.conditioning.needs_text else contextlib.nullcontext():
            return _features(twin, images)

    if images is not None:
        cost = measured(lambda: _features(plain, images), run, twin)
    trained = count(encoder.trainable_parameters())
    return Budget(method, dict(options), trained, count(twin.parameters()) - total, *cost)


def _image_of(model: Any) -> Tensor | None:
    """Return one image without values; None where its size is not known, or a row is not an image."""
    size = getattr(model.config.vision_config, "image_size", None)
    sides = [size, size] if isinstance(size, int) else list(size or ())
    tower, family = find_tower(model)
    if family.layout != "plain" or len(sides) != 2:
        return None
    return torch.empty(1, 3, *sides, dtype=next(tower.parameters()).dtype, device="meta")


def _features(model: Any, images: Any) -> Tensor:
    """Run tower and connector."""
    output = base_of(model).get_image_features(pixel_values=images)
    features = getattr(output, "pooler_output", output)  # before release 5 of transformers, the features themselves
    return features if isinstance(features, Tensor) else features[0]
