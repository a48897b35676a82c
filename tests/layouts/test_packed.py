"""Packed towers: the FFNs see all images as one sequence, and every image still has its own text."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import covft
from covft.adapters import InputFormat, ViTFamily
from covft.errors import ShapeError, UnsupportedViTError
from tests.helpers import oracle
from tests.helpers.releases import found
from tests.helpers.towers import (
    BY_NAME,
    DEPTH,
    PACKED,
    PATCH,
    TEXT_DIM,
    WIDTH,
    Tower,
    exact,
    features,
    image_features,
    perturb,
)

every_packed = pytest.mark.parametrize("tower", PACKED, ids=str)
ROUTINGS = [
    {"routing": "dense"},
    {"routing": "sparse", "top_k": 1},
    {"context": "image"},
    {"context": "concat", "routing": "sparse"},
    {"context": "text"},
]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Batch:
    """A wrapped tower in float64 whose text matters, three images of different sizes, and a text for each."""

    def __init__(self, tower: Tower, **settings: Any) -> None:
        self.tower = tower
        self.encoder = covft.wrap(tower.build().double().eval(), TEXT_DIM, **settings)
        perturb(self.encoder)
        self.images, self.inputs = tower.images(3, torch.float64), tower.inputs(3)
        self.texts = torch.randn(3, TEXT_DIM, dtype=torch.float64)
        self.lengths = tower.lengths(3)

    def output(self, texts: Tensor, **kwargs: Any) -> list[Tensor]:
        """The tokens of each image."""
        tokens = features(self.encoder(self.images, texts, **self.inputs, **kwargs)).flatten(0, -2)
        merged = sum(self.lengths) // len(tokens)  # GLM-4V returns one vector for a square of tokens
        return list(tokens.split([length // merged for length in self.lengths]))

    def alone(self, number: int) -> Any:
        """One image by itself."""
        pixels = self.images[number : number + 1]
        if self.tower.sizes == "grid_thw":
            pixels = self.images.split(self.lengths)[number]
        inputs = {name: value[number : number + 1] for name, value in self.inputs.items()}
        return self.encoder(pixels, self.texts[number : number + 1], **inputs)


@pytest.mark.long
@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
@every_packed
def test_an_image_in_a_batch_is_the_image_alone(tower, settings):
    batch = Batch(tower, **settings)
    together = batch.output(batch.texts)
    weights, vectors = batch.encoder.routing_weights(), batch.encoder.context_vectors()
    assert list(weights) == list(batch.encoder.layers)
    for layer in weights:
        assert weights[layer].shape == (3, 4)
        assert vectors[layer].shape[0] == 3
    for number in range(3):
        output = features(batch.alone(number)).flatten(0, -2)
        torch.testing.assert_close(output, together[number], **exact(tower.name))
        for layer, own in batch.encoder.routing_weights().items():
            torch.testing.assert_close(own[0], weights[layer][number], **exact(tower.name))
    # Images and texts differ so much that an exchange would show.
    assert all((one[0] - one[1]).abs().max() > 1e-3 for one in vectors.values())


@every_packed
def test_another_text_changes_its_image_alone(tower):
    batch = Batch(tower)
    before = batch.output(batch.texts)
    for number in range(3):
        texts = batch.texts.clone()
        texts[number] = torch.randn(TEXT_DIM, dtype=torch.float64)
        after = batch.output(texts)
        same = [torch.allclose(x, y, **EXACT) for x, y in zip(before, after, strict=True)]
        assert same == [other != number for other in range(3)]
    shared = batch.output(batch.texts[:2], index=[1, 0, 1])
    spread = batch.output(batch.texts[[1, 0, 1]])
    assert all(torch.equal(x, y) for x, y in zip(shared, spread, strict=True))


@every_packed
def test_an_ffn_is_the_equations_image_by_image(tower):
    batch = Batch(tower)
    calls: list[tuple[Tensor, Tensor]] = []
    layer = batch.encoder.layers[0]
    slot = batch.encoder.slots()[layer]
    slot.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    batch.output(batch.texts)
    ((x, output),) = calls
    assert batch.encoder.spec.input.layout == {2: "TD", 3: "1TD"}[x.dim()]
    assert output.shape == x.shape
    x, output = x.flatten(0, -2), output.flatten(0, -2)
    assert len(x) == sum(batch.lengths)
    for number, tokens in enumerate(x.split(batch.lengths)):
        vector = oracle.context_vector("cve", slot.context, tokens, batch.texts[number], 4, "gelu")
        weights = oracle.routing_weights(vector, slot.router.gate)
        wanted = sum(weight * expert(tokens) for weight, expert in zip(weights, slot.experts, strict=True))
        torch.testing.assert_close(output.split(batch.lengths)[number], wanted, **EXACT)
        torch.testing.assert_close(batch.encoder.routing_weights()[layer][number], weights, **EXACT)


def test_windows__the_tower_takes_the_tokens_out_of_reading_order():
    """Otherwise the tests of Qwen2.5-VL would not cover windows."""
    batch = Batch(BY_NAME["hf-qwen2.5-vl"])
    merger: list[Tensor] = []
    batch.encoder.vit.merger.register_forward_hook(lambda _, __, output: merger.append(output))
    output = batch.encoder(batch.images, batch.texts, **batch.inputs)
    order = [(merger[0] == row).all(-1).nonzero().item() for row in image_features(output)]
    assert order == [0, 1, 4, 2, 3, 5, 6, 7, 8]


def test_random__experts_are_drawn_per_image():
    batch = Batch(BY_NAME["hf-qwen2-vl"], routing="random", top_k=2)
    batch.encoder(batch.images, **batch.inputs)
    weights = torch.stack(list(batch.encoder.routing_weights().values()))
    assert weights.shape[1:] == (3, 4)
    assert torch.equal((weights == 0.5).sum(-1), torch.full(weights.shape[:2], 2))
    batch.encoder(batch.images, **batch.inputs)
    assert torch.equal(weights, torch.stack(list(batch.encoder.routing_weights().values())))


def test_sparse__an_expert_that_no_image_chose_has_a_gradient_of_zeros():
    batch = Batch(BY_NAME["hf-qwen2.5-vl"], routing="sparse", top_k=1)
    batch.encoder.train()
    features(batch.alone(0)).square().sum().backward()
    unused = 0
    for slot in batch.encoder.slots().values():
        chosen = slot.record.routing.expert_ids_BK.flatten().tolist()
        for number, expert in enumerate(slot.experts):
            assert all(p.grad is not None and p.grad.any() == (number in chosen) for p in expert.parameters())
            unused += number not in chosen
    assert unused == 3 * len(batch.encoder.layers)
    assert batch.encoder.aux_loss().isfinite()


@pytest.mark.parametrize("name", ["hf-qwen2-vl", "hf-qwen2.5-vl", "hf-qwen3-vl"])
def test_videos__a_row_of_the_grid_is_one_image(name):
    tower = BY_NAME[name]
    encoder = covft.wrap(tower.build().eval(), TEXT_DIM)
    perturb(encoder)
    grid = torch.tensor([[3, 2, 4], [1, 4, 4], [2, 2, 2]])
    pixels, texts = torch.randn(48, 6 * PATCH * PATCH), torch.randn(3, TEXT_DIM)
    together = features(encoder(pixels, texts, grid_thw=grid))
    merged = 48 // len(together)  # before release 5, Qwen's towers return one vector for a square of tokens
    together = together.split([24 // merged, 16 // merged, 8 // merged])
    assert all(weights.shape == (3, 4) for weights in encoder.routing_weights().values())
    for number, part in enumerate(pixels.split([24, 16, 8])):
        own = features(encoder(part, texts[number : number + 1], grid_thw=grid[number : number + 1]))
        torch.testing.assert_close(own, together[number], rtol=1e-5, atol=1e-5)


def test_arguments__by_position_and_by_name():
    batch = Batch(BY_NAME["hf-qwen2-vl"])
    wanted = features(batch.encoder(batch.images, batch.texts, **batch.inputs))
    with batch.encoder.condition(batch.texts):
        assert torch.equal(features(batch.encoder.vit(batch.images, batch.inputs["grid_thw"])), wanted)
        by_name = batch.encoder.vit(hidden_states=batch.images, grid_thw=batch.inputs["grid_thw"])
        assert torch.equal(features(by_name), wanted)
    pixtral = Batch(BY_NAME["hf-pixtral"])
    full = torch.tensor([[4 * PATCH, 6 * PATCH]] * 3)
    if inspect.signature(pixtral.encoder.vit.forward).parameters["image_sizes"].default is inspect.Parameter.empty:
        return  # which this release needs
    wanted = features(pixtral.encoder(pixtral.images, pixtral.texts, image_sizes=full))
    assert torch.equal(features(pixtral.encoder(pixtral.images, pixtral.texts)), wanted)
    sizes = [tuple(size) for size in full.tolist()]
    assert torch.equal(features(pixtral.encoder(pixtral.images, pixtral.texts, image_sizes=sizes)), wanted)


def test_one_text_for_all_images():
    batch = Batch(BY_NAME["hf-qwen2.5-vl"])
    batch.encoder.set_text_encoder(covft.testing.HashTextEncoder(TEXT_DIM))
    one, many = (batch.output(text) for text in ("how many?", ["how many?"] * 3))
    assert all(torch.equal(x, y) for x, y in zip(one, many, strict=True))


def test_sizes_that_do_not_fit_are_refused():
    batch = Batch(BY_NAME["hf-qwen2-vl"])
    grid = batch.inputs["grid_thw"]
    with pytest.raises(ShapeError, match="3 images, but the text is for 1"):
        batch.output(batch.texts[:1])
    block = batch.encoder.vit.blocks[1].mlp
    tokens = torch.randn(sum(batch.lengths), WIDTH, dtype=torch.float64)
    with batch.encoder.condition(batch.texts), pytest.raises(ShapeError, match="packed tower runs alone"):
        block(tokens)
    handle = batch.encoder.vit.blocks[1].norm2.register_forward_hook(lambda _, __, output: output[1:])
    with pytest.raises(ShapeError, match=f"{sum(batch.lengths)} tokens, of 3 images"):
        batch.output(batch.texts)
    handle.remove()
    with batch.encoder.condition(batch.texts), pytest.raises(TypeError, match="grid_thw"):
        batch.encoder.vit(batch.images)
    with pytest.raises(ShapeError, match="3 images, but the text is for 2"):
        batch.encoder(batch.images, batch.texts[:2], grid_thw=grid)


# Adapters

ALIKE = {
    "exaone4_5": (
        "Exaone4_5_VisionModel",
        {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3], "num_key_value_heads": 2},
    ),
    "glm4v_moe": ("Glm4vMoeVisionModel", {"image_size": 32}),
    "qwen3_5": ("Qwen3_5VisionModel", {"num_position_embeddings": 16}),
    "qwen3_5_moe": ("Qwen3_5MoeVisionModel", {"num_position_embeddings": 16}),
}


@pytest.mark.parametrize("model", ALIKE)
def test_towers_of_the_same_structure(model):
    name, options = ALIKE[model]
    kind = found(f"models.{model}.modeling_{model}.{name}")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH, "patch_size": PATCH}

    def build() -> nn.Module:
        return kind(kind.config_class(**sizes, depth=DEPTH, num_heads=4, **options))

    tower = Tower(model, build, sizes="grid_thw")
    plain = build().double().eval()
    before = features(plain(tower.images(3, torch.float64), tower.inputs(3)["grid_thw"]))
    assert before.isfinite().all()
    assert covft.describe(plain).input.layout == "TD"
    test_an_image_in_a_batch_is_the_image_alone(tower, {})
    test_another_text_changes_its_image_alone(tower)


def test_describe__tells_how_images_are_packed():
    found = covft.describe(BY_NAME["hf-pixtral"].build()).input
    wanted = InputFormat(layout="1TD", prefix_tokens=0, sizes_argument="image_sizes", sizes_unit=PATCH)
    assert (found, found.is_packed) == (wanted, True)
    spec = covft.describe(BY_NAME["hf-qwen2.5-vl"].build())
    assert spec.input == InputFormat(layout="TD", prefix_tokens=0, sizes_argument="grid_thw")
    assert spec.image_size is spec.num_tokens is None
    assert not covft.describe(BY_NAME["hf-clip"].build()).input.is_packed


class Packed(nn.Module):
    """A tower that covft does not know: patches `(T, 8)` of images that are `sides[i]` points long."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": nn.Identity(), "mlp": self.ffn()}) for _ in range(2))

    def ffn(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, patches: Tensor, cu_seqlens: Tensor | None = None, sides: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            patches = patches + layer["mlp"](patches)
        return patches


def test_adapter__tells_how_images_are_packed():
    known = {"name": "mine", "classes": (f"{__name__}.Packed",), "library": "mine", "blocks": "layers", "mlp": "mlp"}
    with pytest.raises(UnsupportedViTError, match="one sequence, in a way that covft does not know"):
        covft.wrap(Packed(), TEXT_DIM, adapter=ViTFamily(**known))
    with pytest.raises(UnsupportedViTError, match="sizes_argument='grids'"):
        covft.wrap(
            Packed(), TEXT_DIM, adapter=ViTFamily(**known, input=InputFormat(layout="TD", sizes_argument="grids"))
        )
    for half in ({"layout": "TD"}, {"sizes_argument": "sides"}):
        with pytest.raises(UnsupportedViTError, match="a way that covft does not know"):
            covft.wrap(Packed(), TEXT_DIM, adapter=ViTFamily(**known, input=InputFormat(**half)))
    family = ViTFamily(**known, input=InputFormat(layout="TD", sizes_argument="sides", sizes_unit=10))
    encoder = covft.wrap(Packed(), TEXT_DIM, adapter=family, layers=[0, 1])
    perturb(encoder)
    patches, texts = torch.randn(5, 8), torch.randn(2, TEXT_DIM)
    together = encoder(patches, texts, sides=torch.tensor([[20], [30]]))
    own = encoder(patches[2:], texts[1:], sides=torch.tensor([[30]]))
    torch.testing.assert_close(together[2:], own)
