"""Every layout of tokens that an FFN sees, against the same mixture computed token by token from the equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import covft
from covft.adapters import ViTFamily
from covft.errors import MissingContextError, ShapeError
from covft.surgery.layout import TokenLayout
from covft.surgery.split import SplitFFN
from tests.helpers.towers import TEXT_DIM, perturb

D, F = 8, 12


class Block(nn.Module):
    """A block that calls its FFN as the layout wants it, on tokens `(B, N, D)` of a 4 x 4 map."""

    def __init__(self, ffn: nn.Module, layout: str) -> None:
        super().__init__()
        self.attn = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.mlp = ffn
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        y, (images, tokens, width) = self.norm(x), x.shape
        if self.layout == "BHWD":
            y = self.mlp(y.view(images, 4, 4, width)).flatten(1, 2)
        elif self.layout == "BCHW":
            y = self.mlp(y.transpose(1, 2).reshape(images, width, 4, 4)).flatten(2).transpose(1, 2)
        elif self.layout == "(BP)ND":
            y = self.mlp(y.reshape(images * 4, 4, width)).reshape(images, tokens, width)
        elif self.layout == "arguments":
            y = self.mlp(y, (4, 4), scale=0.5)
        else:
            y = self.mlp(y)
        return x + y


class TinyViT(nn.Module):
    def __init__(self, ffn: nn.Module, layout: str, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 2, 2)
        self.blocks = nn.ModuleList(Block(copy.deepcopy(ffn), layout) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class WithArguments(nn.Module):
    """An FFN that needs the sides of the map, as depth-wise convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.dw, self.fc2 = nn.Linear(D, F), nn.Conv2d(F, F, 3, 1, 1, groups=F), nn.Linear(F, D)

    def forward(self, x: Tensor, size: tuple[int, int], scale: float = 1.0) -> Tensor:
        h = self.fc1(x).transpose(1, 2)
        h = self.dw(h.reshape(*h.shape[:2], *size)).flatten(2).transpose(1, 2)
        return scale * self.fc2(torch.nn.functional.gelu(h))


def linear_ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))


def conv_ffn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(D, F, 1), nn.BatchNorm2d(F), nn.GELU(), nn.Conv2d(F, D, 1))


def spatial_ffn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(D, F, 3, padding=1), nn.GELU(), nn.Conv2d(F, D, 3, padding=1))


CASES = {
    "BND": (linear_ffn, "BND"),
    "BHWD": (linear_ffn, "BND"),
    "BCHW": (conv_ffn, "BCHW"),
    "BCHW-3x3": (spatial_ffn, "BCHW"),
    "(BP)ND": (linear_ffn, "(BP)ND"),
    "arguments": (WithArguments, "BND"),
}


def build(case: str, **settings: Any) -> covft.ContextEncoder:
    make, layout = CASES[case]
    vit = TinyViT(make(), case.removesuffix("-3x3")).double().eval()
    for module in vit.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    encoder = covft.wrap(vit, TEXT_DIM, adapter=family(case), layers=[0, 1], experts=3, **settings)
    assert [block.layout for block in encoder.spec.blocks] == [layout] * 2
    perturb(encoder)
    return encoder


def family(case: str) -> ViTFamily:
    folded = ("mlp",) if case == "(BP)ND" else ()
    return ViTFamily(name="tiny", classes=(f"{__name__}.TinyViT",), library="tests", folded=folded)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def texts(batch: int = 3) -> Tensor:
    return torch.randn(batch, TEXT_DIM, dtype=torch.float64)


def oracle(encoder: covft.ContextEncoder, pixels: Tensor, text: Tensor, case: str) -> Tensor:
    """One image after the other, whose experts' outputs are weighed by hand."""
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
@pytest.mark.parametrize("case", CASES)
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
@pytest.mark.parametrize("case", CASES)
def test_identity_at_the_start_and_unwrap(case, settings):
    make, _ = CASES[case]
    vit = TinyViT(make(), case.removesuffix("-3x3")).double().eval()
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
@pytest.mark.parametrize("case", CASES)
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
    with encoder.condition(text[:2]), pytest.raises(ShapeError, match=r"rows .* are not those of the images"):
        block(rows[:7])
    encoder = build("(BP)ND", context="image")
    with pytest.raises(ShapeError, match="how many images there are is not known"):
        encoder.vit.blocks[0].mlp(rows)


class DropsImages(TinyViT):
    """Stochastic depth that leaves images out of a block's batch."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.blocks[0](x[:2]), x[2:]])


def test_an_ffn_that_sees_a_part_of_the_batch_is_refused():
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
    with encoder.condition(texts()):  # by code that calls blocks itself
        for block in vit.blocks:
            x = block(x)
    assert all(torch.equal(buffer, seen[name]) for name, buffer in vit.named_buffers())
    covft.unwrap(encoder)
    assert all(torch.equal(buffer, before[name]) for name, buffer in vit.named_buffers())
    assert all(module.training for module in norms)


# One module in several places


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn, block.norm = nn.Linear(D, D), nn.LayerNorm(D)
        block.mlp2 = block.mlp3 = linear_ffn()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        (block,) = self.blocks
        y = block.norm(x + block.attn(x))
        return torch.cat([y + block.mlp2(y), y[:, :2] + block.mlp3(y[:, :2])], dim=1)


class LinearMlp(nn.Sequential):
    """Found by its class."""


def test_a_shared_ffn_is_replaced_under_all_its_names():
    vit = Shared().double().eval()
    block = vit.blocks[0]
    block.mlp2 = block.mlp3 = LinearMlp(*block.mlp2)
    ffn, x = block.mlp2, torch.randn(3, 5, D, dtype=torch.float64)
    plain, keys = vit(x), vit.state_dict().keys()
    adapter = ViTFamily(name="shared", classes=(f"{__name__}.Shared",), library="tests")
    encoder = covft.wrap(vit, TEXT_DIM, adapter=adapter, layers=[0])
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


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(D, F), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(F, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.dense(h)


class OutputWithResidual(Output):
    def forward(self, h: Tensor, residual: Tensor) -> Tensor:
        return self.dense(h) + residual


class Halves(nn.Module):
    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layer = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layer:
            layer.attention, layer.norm = nn.Linear(D, D), nn.LayerNorm(D)
            layer.intermediate = Intermediate()
            layer.output = OutputWithResidual() if residual else Output()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = x + layer.attention(x)
            h = layer.intermediate(layer.norm(x))
            x = layer.output(h, x) if self.residual else x + layer.output(h)
        return x


HALVES = ViTFamily(name="halves", classes=(f"{__name__}.Halves",), library="tests")


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


def test_halves_are_not_copied():
    first, second = Intermediate(), Output()
    whole = SplitFFN(first, second)
    assert whole.intermediate is first
    assert whole.output is second


# Padding


def naflex() -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0, "patch_size": 4, "reg_tokens": 2}
    return timm.create_model("naflexvit_base_patch16_gap", **options).double().eval()


def patches(lengths: list[int], size: int) -> dict[str, Tensor]:
    """Patches of images that are one patch high, padded with noise, which must not matter."""
    made = torch.randn(len(lengths), size, 48, dtype=torch.float64)
    valid = torch.arange(size) < torch.tensor(lengths)[:, None]
    coordinates = torch.stack([torch.zeros(size), torch.arange(size)], dim=-1).long().expand(len(lengths), -1, -1)
    return {"patches": made, "patch_coord": coordinates * valid[..., None], "patch_valid": valid}


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


def test_a_mask_of_other_tokens_is_refused():
    form = covft.adapters.InputFormat(mask_argument="valid", prefix_tokens=1)
    call = covft.conditioning.TowerCall(form, 1, torch.tensor([[True, False]]), None)
    assert call.mask_for(3).tolist() == [[True, True, False]]
    assert call.mask_for(2).tolist() == [[True, False]]
    with pytest.raises(ShapeError, match="valid does not cover the tokens"):
        call.mask_for(4)


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
