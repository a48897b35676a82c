"""The strength dial: from the ViT as it was to what was trained, without a change of any weight."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import covft
from covft.adapters import ViTFamily
from covft.errors import ConfigError, UnsupportedViTError
from covft.surgery.dial import Beside
from tests.helpers.checkpointing import by_library, one_forward, plain
from tests.helpers.conditioning import Case
from tests.helpers.releases import trained
from tests.helpers.towers import BY_NAME, TEXT_DIM, TOWERS, features, perturb


def wrapped(name, **settings):
    """A wrapped tower, a plain twin, and what both are called with."""
    tower = BY_NAME[name]
    vit = tower.build().eval()
    twin = copy.deepcopy(vit)
    encoder = covft.wrap(vit, TEXT_DIM, **settings)
    perturb(encoder)
    return encoder, twin, tower.images(3), torch.randn(3, TEXT_DIM), tower.inputs(3)


QUICK = ["timm-dinov3", "timm-tnt", "open_clip-native", "hf-clip", "hf-siglip2", "hf-internvl", "hf-qwen2.5-vl"]
SORTED = [pytest.param(t, id=str(t), marks=[] if t.name in QUICK else [pytest.mark.slow]) for t in TOWERS]


@pytest.mark.parametrize("tower", SORTED)
@torch.no_grad()
def test_strength__both_ends_are_exact_for_every_tower(tower):
    encoder, twin, images, text, inputs = wrapped(tower.name)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    full = features(encoder(images, text, **inputs))
    plain_features = features(twin(images, **inputs))
    assert not torch.equal(full, plain_features)
    encoder.strength = 0.5
    half = features(encoder(images, text, **inputs))
    assert not torch.allclose(half, full)
    assert not torch.allclose(half, plain_features)
    encoder.strength = 0
    assert torch.equal(features(encoder(images, text, **inputs)), plain_features)
    assert encoder.routing_weights().keys() == set(encoder.layers)
    encoder.strength = 1
    assert torch.equal(features(encoder(images, text, **inputs)), full)
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert not any(module._forward_hooks for module in encoder.vit.modules() if module is not encoder.vit)


@pytest.mark.parametrize("name", ["timm-clip", "hf-qwen2.5-vl"])
def test_strength__counts_for_updates_of_attentions_too(name):
    encoder, twin, images, text, inputs = wrapped(name, attention_rank=2)
    with torch.no_grad():
        for parameter in encoder.adapted_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        full, start = features(encoder(images, text, **inputs)), features(twin(images, **inputs))
        found = {}
        for strength in (0, 0.5, 1):
            encoder.strength = strength
            found[strength] = features(encoder(images, text, **inputs))
    assert torch.equal(found[0], start)
    assert torch.equal(found[1], full)
    assert not torch.allclose(found[0.5], full)
    encoder.strength = 0
    features(encoder(images, text, **inputs)).square().sum().backward()
    updates = [p for n, p in encoder.vit.named_parameters() if "covft_update" in n]
    assert updates
    assert all(p.grad is not None and not p.grad.any() for p in updates)


@pytest.mark.parametrize("name", ["timm-dinov2", "hf-dinov2-swiglu", "hf-qwen2.5-vl"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"routing": "sparse"}, {"routing": "uniform"}, {"routing": "random"}, {"expert_rank": 2}],
    ids=["dense", "sparse", "uniform", "random", "low-rank"],
)
@torch.no_grad()
def test_strength__is_the_mixture_of_the_equation_in_every_block(settings, name):
    encoder, twin, images, text, inputs = wrapped(name, **settings)
    seen = {}
    for layer, slot in encoder.slots().items():
        slot.register_forward_hook(lambda slot, args, output, layer=layer: seen.update({layer: (args[0], output)}))
    encoder.strength = 0.3
    encoder(images, text, **inputs)
    strength, encoder.strength = encoder.strength, 1
    mixed = dict(seen)
    for layer, slot in encoder.slots().items():
        # The slot's own output for the tokens that it got, and that of the FFN which the plain twin still has.
        x, output = mixed[layer]
        ffn = twin.get_submodule(encoder.spec.blocks[layer].mlp_path)
        routing = slot.record.routing
        segments = (
            None
            if not encoder.spec.input.is_packed
            else torch.repeat_interleave(torch.arange(3), torch.tensor(BY_NAME[name].lengths(3)))
        )
        if segments is not None:
            routing = routing.per_token(segments)
        trained = slot.experts(x, routing)
        torch.testing.assert_close(output, (1 - strength) * ffn(x) + strength * trained)
    norm = encoder.norms[0].rpartition(".")[0]
    x = torch.randn(2, 5, encoder.get_parameter(f"vit.{encoder.norms[0]}").shape[-1])
    trained = encoder.vit.get_submodule(norm)(x)
    encoder.strength = 0.3
    found = encoder.vit.get_submodule(norm)(x)
    torch.testing.assert_close(found, 0.7 * twin.get_submodule(norm)(x) + 0.3 * trained)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf, "0.5", True, None, torch.ones(2)], ids=repr)
def test_strength__is_a_number_from_0_to_1(wrong):
    encoder, *_ = wrapped("timm-clip")
    tuned = covft.tune(BY_NAME["timm-clip"].build(), "cross_attention", text_encoder=TEXT_DIM)
    for dialled in (encoder, tuned):
        with pytest.raises(ConfigError, match=r"strength=.* cannot be used") as raised:
            dialled.strength = wrong
        assert "from 0" in str(raised.value)
        assert dialled.strength == 1


@pytest.mark.parametrize("strength", [0, 0.5])
@pytest.mark.parametrize("name", ["timm-clip", "hf-dinov2-swiglu"])
def test_strength__gradients_are_the_same_with_checkpointing_and_reach_every_parameter(name, strength):
    case = Case(name, routing="sparse")
    case.encoder.strength = strength
    wanted = case.gradients(one_forward, plain(case))
    found = case.gradients(one_forward, by_library(case))
    assert wanted.keys() == {n for n, p in case.encoder.named_parameters() if p.requires_grad}
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-9, atol=1e-12) for n in wanted)
    assert any(gradient.any() for gradient in wanted.values()) == (strength > 0)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
@torch.no_grad()
def test_strength__is_part_of_twins_which_have_their_own(twin_of):
    encoder, _, images, text, _ = wrapped("hf-clip")
    full = features(encoder(images, text))
    encoder.strength = 0.4
    mixed = features(encoder(images, text))
    twin = twin_of(encoder)
    assert twin.strength == 0.4
    assert torch.equal(features(twin(images, text)), mixed)
    twin.strength = 1
    assert torch.equal(features(twin(images, text)), full)
    assert encoder.strength == 0.4
    assert torch.equal(features(encoder(images, text)), mixed)
    assert not any(isinstance(slot.beside, Beside) for slot in twin.slots().values())


@torch.no_grad()
def test_strength__is_never_saved(tmp_path):
    encoder, twin, images, text, _ = wrapped("timm-clip")
    full = encoder(images, text)
    encoder.strength = 0.2
    encoder.save_pretrained(tmp_path)
    loaded = covft.load(tmp_path, twin, TEXT_DIM)
    assert loaded.strength == 1
    assert torch.equal(loaded(images, text), full)


@torch.no_grad()
def test_strength__originals_follow_a_cast_and_unwrap_stays_exact():
    encoder, twin, images, text, _ = wrapped("timm-dinov2")
    encoder.strength = 0
    encoder.to(torch.bfloat16)
    half = copy.deepcopy(twin).to(torch.bfloat16)
    assert torch.equal(encoder(images.bfloat16(), text.bfloat16()), half(images.bfloat16()))
    encoder.train_in_float32()
    assert torch.equal(encoder(images.bfloat16(), text.bfloat16()), half(images.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(images, text), half(images))
    encoder.float()
    vit = covft.unwrap(encoder)
    # What stayed in the ViT was rounded by the caller's cast; what comes back was not.
    assert not torch.equal(vit.blocks[0].mlp.fc1.weight, twin.blocks[0].mlp.fc1.weight)
    for layer in encoder.layers:
        assert torch.equal(vit.blocks[layer].mlp.fc1.weight, twin.blocks[layer].mlp.fc1.weight)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


@torch.no_grad()
def test_strength__under_autocast_the_ends_are_exact():
    encoder, twin, images, text, _ = wrapped("hf-clip")
    with torch.autocast("cpu", torch.bfloat16):
        full = features(encoder(images, text))
        encoder.strength = 0
        assert torch.equal(features(encoder(images, text)), features(twin(images)))
        encoder.strength = 1
        assert torch.equal(features(encoder(images, text)), full)


@pytest.mark.slow
@torch.no_grad()
def test_strength__compiles_when_it_is_set_before():
    encoder, twin, images, text, _ = wrapped("timm-clip", layers=[1])
    encoder.strength = 0.5
    eager = encoder(images, text)
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, text), eager, rtol=0, atol=1e-5)
    encoder.strength = 0  # as documented for one that is compiled already
    torch.compiler.reset()
    torch.testing.assert_close(compiled(images, text), twin(images), rtol=0, atol=1e-5)


@torch.no_grad()
def test_strength__at_0_what_was_trained_does_not_count_whatever_it_is():
    encoder, twin, images, text, _ = wrapped("timm-clip")
    for parameter in encoder.trainable_parameters():
        parameter.fill_(math.inf)
    encoder.strength = 0
    with torch.enable_grad():
        assert torch.equal(encoder(images, text), twin(images))
    assert torch.equal(encoder(images, text), twin(images))


def test_strength__needs_originals():
    with torch.device("meta"):
        encoder = covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM)
    encoder.to_empty(device="cpu")
    with pytest.raises(UnsupportedViTError, match="wrapped on the meta device"):
        encoder.strength = 0.5
    assert encoder.strength == 1
    peft = pytest.importorskip("peft")
    encoder, *_ = wrapped("timm-clip")
    encoder.vit.blocks[0].norm1 = peft.utils.other.ModulesToSaveWrapper(encoder.vit.blocks[0].norm1, "default")
    with pytest.raises(UnsupportedViTError, match="adapters around norms"):
        encoder.strength = 0.5


@trained
@torch.no_grad()
def test_strength__of_the_tower_of_an_attached_model():
    tiny = covft.testing.tiny_llava()
    inputs = tiny.batch(["what is left of the cup?"])
    before = tiny.model.eval()(**inputs).logits
    model = covft.attach(tiny.model, covft.testing.HashTextEncoder(TEXT_DIM), tokenizer=tiny.tokenizer)
    encoder = covft.get_encoder(model)
    perturb(encoder)
    full = model(**inputs).logits
    assert not torch.equal(full, before)
    encoder.strength = 0
    assert torch.equal(model(**inputs).logits, before)
    encoder.strength = 1
    assert torch.equal(model(**inputs).logits, full)


class Attention(nn.Module):
    """The attention of a block of someone's own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(16, 8)

    def forward(self, h, residual):
        return self.dense(h) + residual


class Halves(nn.Module):
    """A block that calls its FFN in two halves, the second of which adds the residual."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.intermediate, self.output = nn.Sequential(nn.Linear(8, 16), nn.GELU()), Adds()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return self.output(self.intermediate(self.norm2(x)), x)


class SplitViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Conv2d(3, 8, 8, 8), nn.ModuleList(Halves() for _ in range(3))

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_strength__split_ffns_and_their_residual():
    vit, images, text = SplitViT().eval(), torch.randn(2, 3, 32, 32), torch.randn(2, TEXT_DIM)
    twin = copy.deepcopy(vit)
    family = ViTFamily(name="own/split", classes=(f"{__name__}.SplitViT",), library="own", blocks="layers")
    encoder = covft.wrap(vit, TEXT_DIM, adapter=family)
    assert encoder.spec.blocks[0].adds_residual
    perturb(encoder)
    full = encoder(images, text)
    encoder.strength = 0
    assert torch.equal(encoder(images, text), twin(images))
    encoder.strength = 0.5
    assert not torch.allclose(encoder(images, text), full)
    encoder.strength = 1
    assert torch.equal(encoder(images, text), full)
    assert torch.equal(covft.unwrap(encoder)(images), twin(images))
