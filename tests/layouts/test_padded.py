"""Padded towers: padding does not reach the context, and every image has its own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import covft
from benchmarks.coverage.transformers_cases import all_cases
from benchmarks.coverage.transformers_inputs import GRIDS, Call
from covft.adapters import InputFormat, ViTFamily
from covft.errors import ShapeError
from tests.helpers import oracle
from tests.helpers.releases import build, found
from tests.helpers.towers import BY_NAME, TEXT_DIM, features, image_features, perturb

TOWERS = (
    "Siglip2VisionModel",
    "Idefics2VisionTransformer",
    "Idefics3VisionTransformer",
    "SmolVLMVisionTransformer",
    "Gemma4VisionModel",
    "Kosmos2_5VisionModel",
    "Pix2StructVisionModel",
    "Phi4MultimodalVisionModel",
)
LENGTHS = [height * width for height, width in GRIDS]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"context": "image", "routing": "sparse", "top_k": 1},
    {"context": "concat"},
]
EXACT = {"rtol": 1e-5, "atol": 1e-5}
every_tower = pytest.mark.parametrize("name", TOWERS)


def call(name: str, vit: Any, numbers: list[int]) -> Call:
    args, kwargs = all_cases()[name][2].inputs(vit, numbers)
    return tuple(x.double() for x in args), {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


class Batch:
    """A wrapped tower in float64 whose text matters, and the real tokens that its FFNs see and return."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.encoder = covft.wrap(build(name).double(), TEXT_DIM, layers=[0, 2, 3], **settings)
        perturb(self.encoder, 0.2)
        self.texts = torch.randn(3, TEXT_DIM, dtype=torch.float64)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, slot in self.encoder.slots().items():
            slot.register_forward_hook(lambda _, args, y, layer=layer: self.seen.update({layer: (args[0], y)}))

    def run(self, numbers: list[int], texts: Tensor | None = None) -> dict[int, list[Tensor]]:
        """What the FFNs return for the real tokens of each image, by layer."""
        args, kwargs = call(self.name, self.encoder.vit, numbers)
        with torch.no_grad():
            self.encoder(*args, self.texts[numbers] if texts is None else texts, **kwargs)
        return {layer: self.real(numbers, y) for layer, (_, y) in self.seen.items()}

    def real(self, numbers: list[int], tokens: Tensor) -> list[Tensor]:
        """Rows without padding. On a canvas the patches of an image are a rectangle in the corner."""
        mask = call(self.name, self.encoder.vit, numbers)[1].get("patch_attention_mask")
        if mask is not None:
            return [row[own] for row, own in zip(tokens, mask.flatten(1), strict=True)]
        return [row[: LENGTHS[number]] for row, number in zip(tokens, numbers, strict=True)]


@pytest.mark.long
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@every_tower
def test_an_image_in_a_batch_is_the_image_alone(name, settings):
    batch = Batch(name, **settings)
    together = batch.run([0, 1, 2])
    assert batch.seen[0][0].shape[1] > min(LENGTHS)  # or nothing is padded
    weights, vectors = batch.encoder.routing_weights(), batch.encoder.context_vectors()
    # Images and texts differ so much that an exchange would show.
    assert all((own[1] - own[2]).abs().max() > 1e-3 for own in vectors.values())
    # Phi-4 attends causally where nothing is padded, so there an image is compared in another batch, not alone.
    beside = [0] if name == "Phi4MultimodalVisionModel" else []
    for number in (1, 2):
        alone = batch.run([number, *beside])
        for layer, own in batch.encoder.routing_weights().items():
            torch.testing.assert_close(own[0], weights[layer][number], **EXACT)
            torch.testing.assert_close(alone[layer][0], together[layer][number], **EXACT)


@every_tower
def test_the_values_of_padding_do_not_matter(name):
    batch = Batch(name)
    args, kwargs = call(name, batch.encoder.vit, [0, 1, 2])
    mask, vectors = real_mask(kwargs), []
    for noise in (0.0, 100.0):
        instead = torch.full((), noise, dtype=torch.float64)
        handle = batch.encoder.slots()[0].register_forward_pre_hook(
            lambda _, given, instead=instead: torch.where(mask[..., None], given[0], instead)
        )
        with torch.no_grad(), batch.encoder.condition(batch.texts):
            batch.encoder.vit(*args, **kwargs)
        handle.remove()
        vectors.append(batch.encoder.context_vectors()[0])
    torch.testing.assert_close(vectors[0], vectors[1], **EXACT)


def real_mask(kwargs: dict[str, Tensor]) -> Tensor:
    """Mark the patches, from the sizes of the images alone."""
    if "patch_attention_mask" in kwargs:
        rows, columns = max(height for height, _ in GRIDS), max(width for _, width in GRIDS)
        mask = torch.zeros(3, rows, columns, dtype=torch.bool)
        for row, (height, width) in enumerate(GRIDS):
            mask[row, :height, :width] = True
        return mask.flatten(1)
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@every_tower
def test_another_text_changes_its_image_alone(name):
    batch = Batch(name)
    before = batch.run([0, 1, 2])
    for number in range(3):
        texts = batch.texts.clone()
        texts[number] = torch.randn(TEXT_DIM, dtype=torch.float64)
        after = batch.run([0, 1, 2], texts)
        for layer in before:
            same = [torch.allclose(x, y, **EXACT) for x, y in zip(before[layer], after[layer], strict=True)]
            assert same == [other != number for other in range(3)]


@every_tower
def test_an_ffn_is_the_equations_over_the_real_tokens(name):
    batch = Batch(name)
    outputs = batch.run([0, 1, 2])
    slot, layer = batch.encoder.slots()[2], 2
    for number, tokens in enumerate(batch.real([0, 1, 2], batch.seen[layer][0])):
        vector = oracle.context_vector("cve", slot.context, tokens, batch.texts[number], 4, "gelu")
        weights = oracle.routing_weights(vector, slot.router.gate)
        wanted = sum(weight * expert(tokens) for weight, expert in zip(weights, slot.experts, strict=True))
        torch.testing.assert_close(outputs[layer][number], wanted, **EXACT)
        torch.testing.assert_close(batch.encoder.routing_weights()[layer][number], weights, **EXACT)


def test_a_mask_that_may_be_left_out():
    """Without a mask Pix2Struct and Kosmos-2.5 find their padding by themselves; so does the context."""
    batch = Batch("Kosmos2_5VisionModel")
    args, kwargs = call(batch.name, batch.encoder.vit, [0, 1, 2])
    batch.encoder(*args, batch.texts, **kwargs)
    given = batch.encoder.routing_weights()
    batch.encoder(*args, batch.texts)
    for layer, weights in batch.encoder.routing_weights().items():
        assert torch.equal(weights, given[layer])


def test_lfm2_vl__the_tower_of_a_multimodal_llm():
    """Its tower is SigLIP 2's; it passes on the real tokens alone."""
    kind, config = found("Lfm2VlForConditionalGeneration"), found("Lfm2VlConfig")
    tower = build("Siglip2VisionModel").config
    text = {
        "model_type": "lfm2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention", "conv"],
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = kind(config(vision_config=tower.to_dict(), text_config=text)).eval()
    encoder = covft.wrap(model.model.vision_tower, TEXT_DIM)
    perturb(encoder)
    model.double()
    texts = torch.randn(3, TEXT_DIM, dtype=torch.float64)

    def features(numbers: list[int]) -> list[Tensor]:
        (pixels,), kwargs = call("Siglip2VisionModel", None, numbers)
        with torch.no_grad(), encoder.condition(texts[numbers]):
            return list(image_features(model.get_image_features(pixels, **kwargs)))

    together = features([0, 1, 2])
    for number in range(3):
        torch.testing.assert_close(features([number])[0], together[number], **EXACT)


def test_packed_calls_of_a_tower_that_also_takes_images_are_refused():
    """RADIO takes images, or all their patches as one sequence, in which no image would have a context of its own."""
    encoder = covft.wrap(build("RadioModel"), covft.testing.HashTextEncoder(TEXT_DIM))
    encoder(torch.randn(2, 3, 32, 32), "how many?")
    with pytest.raises(ShapeError, match="patches as one sequence"):
        encoder(torch.randn(24, 3 * 8 * 8), "how many?", image_grid_hw=torch.tensor([[4, 4], [2, 4]]))


def test_adapter__tells_what_padding_is():
    family = ViTFamily(
        name="mine/gemma4",
        classes=("transformers.models.gemma4.modeling_gemma4.Gemma4VisionModel",),
        library="transformers",
        input=InputFormat(mask_argument="pixel_position_ids", mask_padding=-1),
    )
    spec = covft.describe(build("Gemma4VisionModel"), family)
    assert spec.input == family.input
    assert not spec.input.is_packed
    assert covft.describe(build("Gemma4VisionModel")).input.mask_padding == -1
    assert covft.describe(build("Siglip2VisionModel")).input.mask_padding is None


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["hf-siglip2", "timm-naflex"])
def test_an_image_that_is_all_padding__makes_nothing_but_itself_differ(name, settings):
    tower = BY_NAME[name]
    encoder = covft.wrap(tower.build(), TEXT_DIM, **settings).train()
    perturb(encoder)
    text = torch.randn(2, TEXT_DIM)
    if name == "hf-siglip2":
        images, inputs = tower.images(2), tower.inputs(2)
        real = inputs["pixel_attention_mask"]
        inputs["pixel_attention_mask"] = real * torch.tensor([[1], [0]])
        args: tuple[Any, ...] = (images,)
    else:
        patches = torch.randn(2, 16, 3 * 8 * 8)
        rows = torch.arange(4).repeat_interleave(4)
        coordinates = torch.stack([rows, torch.arange(4).repeat(4)], dim=-1).expand(2, -1, -1)
        valid = torch.ones(2, 16, dtype=torch.bool)
        valid[1] = False
        args, inputs = (patches,), {"patch_coord": coordinates, "patch_valid": valid}
    output = features(encoder(*args, text, **inputs))
    assert output[0].isfinite().all()
    for weights in encoder.routing_weights().values():
        assert weights.isfinite().all()
    output[0].square().sum().backward()
    gradients = [parameter.grad for parameter in encoder.trainable_parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
