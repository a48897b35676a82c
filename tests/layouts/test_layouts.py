"""Every layout of tokens that an FFN sees, against the same mixture computed token by token from the equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import covft
from covft.errors import MissingContextError, ShapeError
from covft.surgery.layout import TokenLayout
from covft.surgery.split import SplitFFN
from tests.helpers.tiny_vits import (
    HALVES,
    LAYOUTS,
    SHARED,
    D,
    F,
    Halves,
    Intermediate,
    Output,
    Shared,
    TinyViT,
    conv_ffn,
    family,
    images,
    linear_ffn,
    naflex,
    patches,
    texts,
    tiny_vit,
)
from tests.helpers.towers import TEXT_DIM, perturb


def build(case: str, **settings: Any) -> covft.ContextEncoder:
    encoder = covft.wrap(tiny_vit(case), TEXT_DIM, adapter=family(case), layers=[0, 1], experts=3, **settings)
    assert [block.layout for block in encoder.spec.blocks] == [LAYOUTS[case][1]] * 2
    perturb(encoder)
    return encoder


def oracle(encoder: covft.ContextEncoder, pixels: Tensor, text: Tensor, case: str) -> Tensor:
    """Compute one image after another, weighting the outputs of its experts by hand."""
    outputs = []
    for image, feature in zip(pixels.split(1), text.split(1), strict=True):
        x = encoder.vit.patches(image).flatten(2).transpose(1, 2)
        for block in encoder.vit.blocks:
            x = x + block.attn(x)
            y = block.norm(x)
            slot = block.mlp
            context = slot.context(y, feature)
            weights = torch.softmax(slot.router.gate(context), dim=-1)[0]
            if slot.router.__class__.__name__ == "SparseRouter":
                kept = weights.topk(2).indices
                weights = torch.zeros_like(weights).index_put((kept,), weights[kept] / weights[kept].sum())
            mixed = 0
            for weight, expert in zip(weights, slot.experts, strict=True):
                if case.startswith("BCHW"):
                    out = expert(y.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
                elif case == "arguments":
                    out = expert(y, (4, 4), scale=0.5)
                else:
                    out = expert(y)
                mixed = mixed + weight * out
            x = x + mixed
        outputs.append(x)
    return torch.cat(outputs)


@pytest.mark.parametrize("routing", ["dense", "sparse"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_outputs_and_gradients_are_those_of_the_equations(case, routing):
    encoder = build(case, routing=routing)
    pixels, text = images(), texts()
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    wanted = oracle(encoder, pixels, text, case)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), parameters, allow_unused=True)
    found = encoder(pixels, text)
    torch.testing.assert_close(found, wanted)
    found_gradients = torch.autograd.grad(found.square().sum(), parameters)
    for ours, theirs in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@pytest.mark.parametrize("settings", [{}, {"routing": "sparse"}, {"context": "image"}, {"routing": "random"}], ids=str)
@pytest.mark.parametrize("case", LAYOUTS)
def test_identity_at_the_start_and_unwrap(case, settings):
    vit = tiny_vit(case)
    pixels, before = images(), {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    plain, ffn = vit(pixels), vit.blocks[0].mlp
    encoder = covft.wrap(vit, TEXT_DIM, adapter=family(case), layers=[0, 1], **settings)
    torch.testing.assert_close(encoder(pixels, texts()), plain)
    encoder.train()
    encoder(pixels, texts())
    encoder.eval()
    perturb(encoder)
    assert not torch.allclose(encoder(pixels, texts()), plain)
    assert all(weights.shape == (3, 4) for weights in encoder.routing_weights().values())
    covft.unwrap(encoder)
    assert vit.blocks[0].mlp is ffn
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(vit(pixels), plain)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", LAYOUTS)
def test_an_image_does_not_depend_on_its_batch(case, training):
    encoder = build(case).train(training)
    pixels, text = images(), texts()
    together = encoder(pixels, text)
    other = torch.cat([texts(1), text[1:]])
    changed = encoder(torch.cat([images(1), pixels[1:]]), other)
    torch.testing.assert_close(changed[1:], together[1:])
    torch.testing.assert_close(encoder(pixels[1:2], text[1:2]), together[1:2])
    assert not torch.allclose(encoder(pixels, other)[0], together[0])


@pytest.mark.parametrize("case", ["BCHW", "(BP)ND"])
def test_checkpointing_recomputes_the_same(case):
    encoder = build(case).train()
    pixels, text, other = images(), texts(), texts()
    parameters = list(encoder.trainable_parameters())
    wanted = torch.autograd.grad(encoder(pixels, text).square().sum(), parameters)

    def run(x: Tensor) -> Tensor:
        for block in encoder.vit.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x

    with encoder.condition(text):
        output = run(encoder.vit.patches(pixels).flatten(2).transpose(1, 2))
    with encoder.condition(other):
        found = torch.autograd.grad(output.square().sum(), parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_are_counted_by_the_tower_or_by_the_texts():
    encoder = build("(BP)ND")
    block, rows = encoder.vit.blocks[0].mlp, torch.randn(12, 4, D, dtype=torch.float64)
    text = texts()
    with encoder.condition(text):
        alone = block(rows)
    with encoder.condition(text[:2], index=[0, 1, 1]):
        assert not torch.allclose(block(rows), alone)
    with pytest.raises(MissingContextError):
        block(rows)
    with encoder.condition(text[:2]), pytest.raises(ShapeError, match=r"rows .* cannot be split among the images"):
        block(rows[:7])
    encoder = build("(BP)ND", context="image")
    with pytest.raises(ShapeError, match="how many images there are is not known"):
        encoder.vit.blocks[0].mlp(rows)


class DropsImages(TinyViT):
    """Stochastic depth that leaves images out of a block's batch."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.blocks[0](x[:2]), x[2:]])


def test_an_ffn_that_sees_part_of_the_batch_is_refused():
    vit = DropsImages(linear_ffn(), "BND", depth=1).double()
    encoder = covft.wrap(vit, TEXT_DIM, adapter=family("BND"), layers=[0])
    with pytest.raises(ShapeError, match="sees other rows than the images") as caught:
        encoder(images(3), texts(3))
    assert "2 rows" in caught.value.got
    assert "stochastic depth" in caught.value.fix
    one = covft.wrap(covft.unwrap(encoder), TEXT_DIM, adapter=family("BND"), layers=[0], context="image")
    assert one(images(3)).shape == (3, 16, D)


# Batch norms


class Normed(TinyViT):
    def __init__(self) -> None:
        super().__init__(conv_ffn(), "BCHW")
        self.patches = nn.Sequential(nn.Conv2d(3, D, 2, 2), nn.BatchNorm2d(D))


def test_statistics_of_batch_norms_are_kept_in_training():
    vit = Normed().double().train()
    before = {name: buffer.clone() for name, buffer in vit.named_buffers()}
    norms = [module for module in vit.modules() if isinstance(module, nn.BatchNorm2d)]
    encoder = covft.wrap(vit, TEXT_DIM, adapter=family("BCHW"), layers=[0, 1], routing="sparse", top_k=1).train()
    optimizer = torch.optim.SGD(encoder.trainable_parameters(), lr=0.1)
    for _ in range(2):
        encoder(images(), texts()).square().mean().backward()
        optimizer.step()
    experts = encoder.vit.blocks[0].mlp.experts
    assert all(torch.equal(e[1].running_mean, before["blocks.0.mlp.1.running_mean"]) for e in experts)
    assert not torch.equal(experts[0][1].weight, vit.blocks[0].mlp.experts[1][1].weight)
    assert torch.equal(vit.patches[1].running_mean, before["patches.1.running_mean"])
    seen = {name: buffer.clone() for name, buffer in vit.named_buffers()}
    vit.train()
    x = torch.randn(3, 16, D, dtype=torch.float64)
    with encoder.condition(texts()):  # blocks called without the tower
        for block in vit.blocks:
            x = block(x)
    assert all(torch.equal(buffer, seen[name]) for name, buffer in vit.named_buffers())
    covft.unwrap(encoder)
    assert all(torch.equal(buffer, before[name]) for name, buffer in vit.named_buffers())
    assert all(module.training for module in norms)


# One module under several names


def test_a_shared_ffn_is_replaced_under_all_its_names():
    vit = Shared().double().eval()
    block = vit.blocks[0]
    ffn, x = block.mlp2, torch.randn(3, 5, D, dtype=torch.float64)
    plain, keys = vit(x), vit.state_dict().keys()
    encoder = covft.wrap(vit, TEXT_DIM, adapter=SHARED, layers=[0])
    assert encoder.spec.depth == 1
    assert encoder.spec.blocks[0].aliases == ("blocks.0.mlp3",)
    assert block.mlp2 is block.mlp3 is encoder.slots()[0]
    torch.testing.assert_close(encoder(x, texts()), plain)
    perturb(encoder)
    text = texts()
    found = encoder(x, text)
    assert not torch.allclose(found[:, :5], plain[:, :5])
    assert not torch.allclose(found[:, 5:], plain[:, 5:])
    covft.unwrap(encoder)
    assert block.mlp2 is block.mlp3 is ffn
    assert vit.state_dict().keys() == keys
    assert torch.equal(vit(x), plain)


# An FFN in two halves


@pytest.mark.parametrize("residual", [False, True])
def test_an_ffn_in_two_halves_is_one_ffn(residual):
    vit = Halves(residual=residual).double().eval()
    x, text = torch.randn(3, 5, D, dtype=torch.float64), texts()
    plain, before = vit(x), {name: id(module) for name, module in vit.named_modules()}
    encoder = covft.wrap(vit, TEXT_DIM, adapter=HALVES, layers=[0, 1])
    block = encoder.spec.blocks[0]
    assert (block.mlp, block.output, block.adds_residual) == ("intermediate", "output", residual)
    assert (block.embed_dim, block.ffn_dim, block.ffn_parameters) == (D, F, D * F + F + F * D + D)
    torch.testing.assert_close(encoder(x, text), plain)
    perturb(encoder)

    wanted = x
    for layer in vit.layer:
        wanted = wanted + layer.attention(wanted)
        y, slot = layer.norm(wanted), layer.intermediate
        weights = torch.softmax(slot.router.gate(slot.context(y, text)), dim=-1)
        parts = [e.output.dense(e.intermediate.act(e.intermediate.dense(y))) for e in slot.experts]
        wanted = wanted + sum(weights[:, i, None, None] * part for i, part in enumerate(parts))
    torch.testing.assert_close(encoder(x, text), wanted)

    first = vit.layer[0]
    assert first.output.dense is first.intermediate.experts[0].output.dense
    assert first.intermediate.dense is first.intermediate.experts[0].intermediate.dense
    twin = copy.deepcopy(encoder)
    torch.testing.assert_close(twin(x, text), wanted)
    assert twin.vit.layer[0].output.slot is twin.vit.layer[0].intermediate
    assert not any(name.startswith("layer.0.output.") for name in vit.state_dict())
    covft.unwrap(encoder)
    assert {name: id(module) for name, module in vit.named_modules()} == before
    assert torch.equal(vit(x), plain)


def test_split_ffn__keeps_its_halves():
    first, second = Intermediate(), Output()
    whole = SplitFFN(first, second)
    assert whole.intermediate is first
    assert whole.output is second


# Padding


def test_padding_of_naflex_does_not_reach_the_context():
    vit = naflex()
    plain = copy.deepcopy(vit)
    batch, text = patches([4, 7], size=9), texts(2)
    encoder = covft.wrap(vit, TEXT_DIM, layers=[0, 1, 2])
    torch.testing.assert_close(encoder(batch, text), plain(batch))
    perturb(encoder)
    found = encoder(batch, text)
    weights = {layer: value.clone() for layer, value in encoder.routing_weights().items()}
    noisy = {**batch, "patches": batch["patches"] + 5 * ~batch["patch_valid"][..., None]}
    torch.testing.assert_close(encoder(noisy, text), found)
    for layer, value in encoder.routing_weights().items():
        torch.testing.assert_close(value, weights[layer])
    torch.testing.assert_close(encoder(batch["patches"], text, **_rest(batch)), found)
    assert encoder(torch.randn(2, 3, 8, 8, dtype=torch.float64), text).shape == (2, 32)
    wrong = {**batch, "patch_valid": batch["patch_valid"][:1]}
    with pytest.raises(ShapeError, match="2 images, but the text is for 1"):
        encoder(wrong, text[:1])


def _rest(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "patches"}


@pytest.mark.parametrize(("layout", "shape"), [("(BP)ND", (4, 3, D)), ("(BP)CHW", (4, D, 3, 1))])
def test_token_layout__parts_of_an_image_stay_together(layout, shape):
    x = torch.randn(shape)
    tokens = TokenLayout(layout).tokens(x, 2)
    rows = x if layout == "(BP)ND" else x.flatten(2).transpose(1, 2)
    assert torch.equal(tokens, torch.stack([torch.cat([rows[0], rows[1]]), torch.cat([rows[2], rows[3]])]))
    assert TokenLayout(layout).image_of_rows(x, 2).tolist() == [0, 0, 1, 1]


def test_shared_ffn__is_saved_once_and_loaded(tmp_path):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("coat_tiny", img_size=64, embed_dims=(32,) * 4, parallel_depth=1).eval()
    twin, images, text = copy.deepcopy(vit), torch.randn(2, 3, 64, 64), torch.randn(2, 16)
    encoder = covft.wrap(vit, 16, layers=range(9))
    perturb(encoder)
    wanted = encoder(images, text)
    encoder.save_pretrained(tmp_path)
    assert torch.equal(covft.load(tmp_path, twin, 16)(images, text), wanted)
