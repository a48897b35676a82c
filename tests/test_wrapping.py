"""wrap() and unwrap() on every family: nothing changes at the start, exactly what should train trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import covft
from covft.config import CoVFTConfig
from covft.errors import (
    ConfigError,
    LayerIndexError,
    ShapeError,
    TextEncoderError,
    UnknownViTError,
    UnsupportedViTError,
)
from tests.helpers.releases import needs_hidden_states
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME, TEXT_DIM, TOWERS, features, hidden_states, perturb

SETTINGS = [
    *({"routing": routing} for routing in CoVFTConfig.choices("routing")),
    *({"context": context} for context in CoVFTConfig.choices("context") if context != "cve"),
]


# What the first call of a tower of transformers changes: it installs hooks that capture hidden states.
CALLED = ("hooks", "attributes")


def looks_at_text(settings: dict[str, str]) -> bool:
    return settings.get("routing", "dense") in ("dense", "sparse") and settings.get("context") != "image"


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Every tensor of a ViT's output, by name."""
    if isinstance(output, Tensor):
        return {"output": output}
    found: dict[str, Tensor] = {}
    # Releases of transformers in which Qwen3-VL's tower returns a tuple.
    named = enumerate(output) if isinstance(output, tuple) else output.items()
    for name, value in named:
        parts = value if isinstance(value, tuple) else (value,)
        found.update({f"{name}.{i}": part for i, part in enumerate(parts) if isinstance(part, Tensor)})
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tower", TOWERS, ids=str)
def test_wrap__identity_text_matters_unwrap(tower, settings):
    vit = tower.build().eval()
    vit.requires_grad_(True)
    images, inputs, asked = tower.images(3), tower.inputs(3), hidden_states(vit)
    before, plain = snapshot(vit), vit(images, **inputs, **asked)
    encoder = covft.wrap(vit, TEXT_DIM, **settings)
    one, two = torch.randn(3, TEXT_DIM), torch.randn(3, TEXT_DIM)

    wrapped = encoder(images, one, **inputs, **asked)
    assert type(wrapped) is type(plain)
    expected, found = tensors_of(plain), tensors_of(wrapped)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name

    perturb(encoder)
    first = tensors_of(encoder(images, one, **inputs))
    second = tensors_of(encoder(images, two, **inputs))
    differs = any(not torch.equal(first[name], second[name]) for name in first)
    assert differs == looks_at_text(settings)

    assert covft.unwrap(encoder) is vit
    assert_unchanged(vit, before, without=CALLED)
    again = tensors_of(vit(images, **inputs, **asked))
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("train_norms", ["all", "adapted", "none"])
@pytest.mark.parametrize("tower", TOWERS, ids=str)
def test_training__exactly_the_named_parameters_move(tower, train_norms):
    vit = tower.build()
    # LayerScale at its initial 1e-5 leaves gradients of adapted blocks too small to tell from zero.
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("gamma", "lambda1", "lambda_1", "lambda_2", "gamma_1", "gamma_2")):
                parameter.fill_(1.0)
    layers = [1, 2]
    before = snapshot(vit)
    encoder = covft.wrap(vit, TEXT_DIM, layers=layers, train_norms=train_norms).train()
    perturb(encoder)

    expected = set()
    for block in encoder.spec.blocks:
        if block.index in layers:
            expected |= {f"{block.mlp_path}.{n}" for n, _ in vit.get_submodule(block.mlp_path).named_parameters()}
        reached = {"all": block.index <= 2, "adapted": block.index in layers, "none": False}[train_norms]
        if reached:
            for name, module in vit.get_submodule(block.path).named_modules():
                if isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__:
                    if not f"{name}.".startswith(f"{block.mlp}."):
                        expected |= {f"{block.path}.{name}.{n}" for n, _ in module.named_parameters()}
    trained = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert trained == expected

    optimizer = torch.optim.AdamW(encoder.trainable_parameters(), lr=1e-3, weight_decay=0.0)
    start = {name: p.detach().clone() for name, p in vit.named_parameters()}
    had_gradient: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        images, inputs = tower.images(4), tower.inputs(4)
        output = encoder(images, torch.randn(4, TEXT_DIM), **inputs, **hidden_states(encoder.vit))
        if not isinstance(output, Tensor):
            needs_hidden_states(encoder.vit, output)
        read = output if isinstance(output, Tensor) else output.hidden_states[-2]  # the penultimate block
        read.square().sum().backward()
        had_gradient |= {n for n, p in vit.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    moved = {name for name, p in vit.named_parameters() if not torch.equal(p, start[name])}
    assert had_gradient == expected
    assert moved == expected

    covft.unwrap(encoder)
    assert_unchanged(vit, before, without=CALLED)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_training__experts_diverge_from_equal_starts(optimizer_class):
    tower = BY_NAME["hf-clip"]
    encoder = covft.wrap(tower.build(), TEXT_DIM).train()
    gates = [slot.router.gate.weight for slot in encoder.slots().values()]
    assert all(gate.abs().max() > 0 for gate in gates)
    optimizer = optimizer_class(encoder.trainable_parameters(), lr=1e-3)
    images, texts = tower.images(8), torch.randn(8, TEXT_DIM)
    target = torch.randn(8, 17, 32)
    for step in range(20):
        optimizer.zero_grad()
        (features(encoder(images, texts)) - target).square().mean().backward()
        if step == 0:
            # Equal experts: no gradient for the router yet, and proportional ones for the experts.
            for slot in encoder.slots().values():
                assert slot.router.gate.weight.grad.abs().max() < 1e-6
        optimizer.step()
    for slot in encoder.slots().values():
        weights = [next(expert.parameters()) for expert in slot.experts]
        apart = min((weights[i] - weights[j]).norm() for i in range(4) for j in range(i))
        assert apart > 1e-6
        assert slot.router.gate.weight.grad.abs().max() > 0


def clip_l_336() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel(config)


def test_clip_l_336__parameters():
    """The paper's tower, full size, random weights: 24 blocks, blocks 11 to 22, 4 experts."""
    with torch.device("meta"):
        tower = clip_l_336()
        encoder = covft.wrap(tower, 768, layers=range(11, 23), experts=4)
    slots = encoder.slots()
    assert list(slots) == list(range(11, 23))
    each = {sum(p.numel() for p in slot.parameters()) for slot in slots.values()}
    assert each == {43_485_188}
    added = sum(p.numel() for slot in slots.values() for p in slot.parameters())
    replaced = sum(p.numel() for ffn in encoder.original.ffns.values() for p in ffn.parameters())
    assert (added, added - replaced) == (521_822_256, 421_097_520)
    assert all(p.is_meta for p in encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("routing", CoVFTConfig.choices("routing"))
def test_clip_l_336__identity_at_full_size(routing):
    vit = clip_l_336().eval()
    images = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        plain = vit(images, output_hidden_states=True)
        encoder = covft.wrap(vit, 768, layers=range(11, 23), experts=4, routing=routing)
        wrapped = encoder(images, torch.randn(1, 768), output_hidden_states=True)
        assert len(wrapped.hidden_states) == 25
        for one, other in zip(wrapped.hidden_states, plain.hidden_states, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
        assert (wrapped.pooler_output - plain.pooler_output).norm() <= 1e-5 * plain.pooler_output.norm()
        if routing in ("dense", "sparse"):
            perturb(encoder, 0.01)
            one = encoder(images, torch.randn(1, 768)).last_hidden_state
            assert not torch.equal(one, encoder(images, torch.randn(1, 768)).last_hidden_state)
        covft.unwrap(encoder)
        again = vit(images, output_hidden_states=True)
        assert all(torch.equal(a, b) for a, b in zip(again.hidden_states, plain.hidden_states, strict=True))


# Refused before anything has changed


def _resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet18", num_classes=0)


def _wrapped_vit() -> nn.Module:
    return covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM).vit


REFUSED = [
    (
        None,
        {"layers": range(2, 7)},
        LayerIndexError,
        r"layers=range\(2, 7\) asks for blocks .*\n.*\[-4, 3\].*\n.*4, 5, 6",
    ),
    (None, {"layers": [-5]}, LayerIndexError, "Got:      -5"),
    (None, {"layers": [1, -3]}, LayerIndexError, "names a block twice"),
    (None, {"layers": [1, 1]}, ConfigError, "names a block twice"),
    (None, {"layers": []}, ConfigError, "layers is empty"),
    (None, {"layers": 3}, ConfigError, "expected|Expected"),
    (None, {"experts": 0}, ConfigError, "experts=0"),
    (None, {"experts": 2.5}, ConfigError, "experts=2.5"),
    (None, {"routing": "top1"}, ConfigError, r"routing='top1' is not known.*\n.*dense \| sparse"),
    (None, {"context": "both"}, ConfigError, "context='both'"),
    (None, {"train_norms": True}, ConfigError, "train_norms=True"),
    (None, {"activation": "relu"}, ConfigError, "activation='relu'"),
    (None, {"routing": "sparse", "top_k": 5}, ConfigError, "top_k=5"),
    (None, {"num_heads": 5}, ConfigError, "does not divide"),
    (None, {"text_encoder": None}, ConfigError, "needs text"),
    (None, {"text_encoder": object()}, TextEncoderError, "text encoder"),
    (None, {"text_encoder": 0}, TextEncoderError, "width"),
    (_resnet, {}, UnknownViTError, "ResNet has no transformer blocks"),
    (lambda: nn.Linear(3, 3), {}, UnknownViTError, "No adapter knows"),
    (_wrapped_vit, {}, UnsupportedViTError, "wrapped already"),
]


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSED)
def test_wrap__refuses_before_anything_changed(build, options, error, message):
    vit = (build or BY_NAME["timm-clip"].build)()
    before = snapshot(vit)
    options = {"text_encoder": TEXT_DIM, **options}
    with pytest.raises(error, match=message):
        covft.wrap(vit, **options)
    assert_unchanged(vit, before)


def test_wrap__refuses_an_encoder_and_a_compiled_vit():
    encoder = covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM)
    with pytest.raises(UnsupportedViTError, match="wrapped already"):
        covft.wrap(encoder, TEXT_DIM)
    with pytest.raises(UnsupportedViTError, match=r"inside OptimizedModule(.|\n)*vit\._orig_mod"):
        covft.wrap(torch.compile(BY_NAME["timm-clip"].build()), TEXT_DIM)


def test_wrap__refuses_ddp(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        vit = BY_NAME["timm-clip"].build()
        with pytest.raises(UnsupportedViTError, match=r"inside DistributedDataParallel(.|\n)*vit\.module"):
            covft.wrap(DistributedDataParallel(vit), TEXT_DIM)
    finally:
        torch.distributed.destroy_process_group()


def test_unwrap__refused_twice_and_for_anything_else():
    encoder = covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM)
    vit = covft.unwrap(encoder)
    with pytest.raises(UnsupportedViTError, match="unwrapped already"):
        covft.unwrap(encoder)
    with pytest.raises(UnsupportedViTError, match=r"not what covft\.wrap returned"):
        covft.unwrap(vit)
    assert covft.wrap(vit, TEXT_DIM).layers == (1, 2)


def test_unwrap__follows_a_cast():
    tower = BY_NAME["timm-clip"]
    vit = tower.build()
    plain = copy.deepcopy(vit).to(torch.bfloat16)
    encoder = covft.wrap(vit, TEXT_DIM).to(torch.bfloat16)
    covft.unwrap(encoder)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_unwrap__keeps_types_that_differ_within_an_ffn():
    vit = BY_NAME["timm-clip"].build().to(torch.bfloat16)
    vit.blocks[1].mlp.fc2.float()
    before = snapshot(vit)
    covft.unwrap(covft.wrap(vit, TEXT_DIM))
    assert_unchanged(vit, before)
    assert vit.blocks[1].mlp.fc2.weight.dtype == torch.float32


# Settings


def test_settings__given_keywords_override_config_which_overrides_defaults():
    config = CoVFTConfig(layers=(1,), experts=3, routing="sparse", top_k=1)
    build = BY_NAME["timm-clip"].build
    plain = covft.wrap(build(), TEXT_DIM, config=config).covft_config
    assert (plain.layers, plain.experts, plain.routing, plain.top_k) == ((1,), 3, "sparse", 1)
    # A keyword that equals the default still overrides the configuration.
    given = covft.wrap(build(), TEXT_DIM, config=config, experts=4, layers=None).covft_config
    assert (given.layers, given.experts, given.routing) == ((1, 2), 4, "sparse")


@pytest.mark.parametrize(("depth", "layers"), [(24, range(11, 23)), (12, range(5, 11)), (4, (1, 2)), (1, (0,))])
def test_settings__default_layers_are_the_second_half_without_the_last(depth, layers):
    import timm

    vit = timm.create_model("test_vit", depth=depth, num_classes=0)
    assert covft.wrap(vit, TEXT_DIM).layers == tuple(layers)


def test_settings__negative_layers_count_from_the_end():
    encoder = covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM, layers=[-2, 0])
    assert encoder.layers == (0, 2)


@pytest.mark.parametrize("settings", [{"routing": "uniform"}, {"routing": "random"}, {"context": "image"}], ids=str)
def test_settings__text_is_optional_where_the_routing_does_not_need_it(settings):
    tower = BY_NAME["hf-clip"]
    encoder = covft.wrap(tower.build().eval(), None, **settings)
    images = tower.images(2)
    assert torch.equal(encoder(images).last_hidden_state, encoder.vit(images).last_hidden_state)


def test_wrap__new_modules_are_where_and_what_the_ffn_is():
    vit = BY_NAME["hf-clip"].build().to(torch.bfloat16)
    encoder = covft.wrap(vit, TEXT_DIM)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    output = encoder(BY_NAME["hf-clip"].images(2, torch.bfloat16), torch.randn(2, TEXT_DIM))
    assert output.last_hidden_state.dtype == torch.bfloat16


def test_wrap__survives_initialisation_by_transformers():
    encoder = covft.wrap(BY_NAME["hf-clip"].build(), TEXT_DIM)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    encoder.vit.init_weights()
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())


def test_wrap__padding_does_not_reach_the_context():
    tower = BY_NAME["hf-siglip2"]
    encoder = covft.wrap(tower.build().eval(), TEXT_DIM)
    perturb(encoder)
    images, inputs, text = tower.images(2), tower.inputs(2), torch.randn(2, TEXT_DIM)
    encoder(images, text, **inputs)
    before = encoder.routing_weights()
    changed = images + 50 * (1 - inputs["pixel_attention_mask"])[..., None]
    encoder(changed, text, **inputs)
    for layer, weights in encoder.routing_weights().items():
        assert torch.allclose(weights, before[layer], atol=1e-6)


def test_wrap__shape_errors_come_from_the_tower_not_from_the_ffn():
    encoder = covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM, routing="sparse")
    with pytest.raises(ShapeError, match="2 images"):
        encoder(BY_NAME["timm-clip"].images(2), torch.randn(3, TEXT_DIM))
