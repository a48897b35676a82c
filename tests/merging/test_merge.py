"""covft.merge of mixtures: exact for equal experts, and a report that is right on planted cases."""

from __future__ import annotations

import copy

import pytest
import torch

import covft
from covft.errors import ConfigError, MergeError, UnsupportedViTError
from covft.testing import HashTextEncoder
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME, TOWERS, features, perturb

TEXTS = HashTextEncoder(16)
QUESTIONS = ["what is left of the cup?", "how many people are there?", "where is the dog?", "a cat?"]
KINDS = ["where", "count", "where", "yes"]
# One of each kind of place: plain, in two halves, packed, windowed, two FFNs per block.
QUICK = ("hf-clip", "hf-vit", "hf-qwen2.5-vl")
every_tower = pytest.mark.parametrize(
    "name", [pytest.param(t.name, marks=() if t.name in QUICK else pytest.mark.long) for t in TOWERS]
)


def wrapped(name="timm-clip", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    vit = BY_NAME[name].build().to(dtype).eval()
    plain = copy.deepcopy(vit)
    options = {"layers": [1, 2], "experts": 3, **settings}
    return plain, covft.wrap(vit, TEXTS, **options)


def spread(encoder, scale=0.3, *parts):
    """Move what is trained, or only some parts of it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.vit.named_parameters():
            if parameter.requires_grad and (not parts or encoder.part_of(name) in parts):
                parameter.add_(scale * torch.randn_like(parameter))


def samples(name="timm-clip", dtype=torch.float64):
    torch.manual_seed(2)
    images = BY_NAME[name].images(4, dtype)
    return images, [(images, QUESTIONS, KINDS)]


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def by_arguments(tower, dtype=torch.float64):
    """A batch that only the tower can read, as packed ones are."""
    torch.manual_seed(2)
    return {"images": tower.images(4, dtype), "context_text": QUESTIONS, "kind": KINDS, **tower.inputs(4)}


@every_tower
def test_equal_experts_are_merged_exactly_and_trained_norms_stay(name):
    tower = BY_NAME[name]
    plain, encoder = wrapped(name)
    spread(encoder, 0.1, "norms", "router")
    with torch.no_grad():
        for slot in encoder.slots().values():  # equal, but not as they were
            for parameters in zip(*(expert.parameters() for expert in slot.experts), strict=True):
                noise = 0.1 * torch.randn_like(parameters[0])
                for parameter in parameters:
                    parameter.add_(noise)
    batch = by_arguments(tower)
    inputs = {key: value for key, value in batch.items() if key not in ("context_text", "kind", "images")}
    with torch.no_grad():
        wanted = features(encoder(batch["images"], QUESTIONS, **inputs))
    vit, report = covft.merge(encoder, [batch])
    assert vit is encoder.vit
    assert {n: (v.shape, v.dtype) for n, v in vit.state_dict().items()} == {
        n: (v.shape, v.dtype) for n, v in plain.state_dict().items()
    }
    with torch.no_grad():
        found = features(vit(batch["images"], **inputs))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert report.total.features < 1e-6 < report.total.tuning
    assert all(loss.routing < 1e-6 and loss.averaging < 1e-6 for loss in report.blocks.values())
    assert report.total.samples == 4
    assert {kind: shift.samples for kind, shift in report.kinds.items()} == {"where": 2, "count": 1, "yes": 1}


@pytest.mark.parametrize("routing", ["dense", "sparse", "uniform"])
def test_the_average_has_the_mean_routing_and_the_report_its_errors(routing):
    plain, encoder = wrapped(routing=routing, train_norms="adapted")
    spread(encoder)
    images, data = samples()
    with torch.no_grad():
        wanted = encoder(images, QUESTIONS)
        means = {layer: weights.mean(0) for layer, weights in encoder.routing_weights().items()}
    expected = copy.deepcopy(plain)
    with torch.no_grad():
        for name in encoder.norms:
            expected.get_parameter(name).copy_(encoder.vit.get_parameter(name))
        for layer, slot in encoder.slots().items():
            for name, parameter in expected.blocks[layer].mlp.named_parameters():
                experts = torch.stack([expert.get_parameter(name) for expert in slot.experts])
                parameter.copy_(torch.tensordot(means[layer].double(), experts, 1))
        seen = {}
        slots = encoder.slots()
        handles = [
            slot.experts.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args}))
            for layer, slot in slots.items()
        ]
        encoder(images, QUESTIONS)
        for handle in handles:
            handle.remove()
        losses = {}
        for layer, (x, routed) in seen.items():
            outputs = torch.stack([expert(x) for expert in slots[layer].experts])
            weights = routed.weights_BE.double()
            mixture = torch.einsum("be,ebnd->bnd", weights, outputs)
            fixed = torch.einsum("e,ebnd->bnd", means[layer].double(), outputs)
            one = expected.blocks[layer].mlp(x)
            deviation = (weights - means[layer]).square().sum(1).mean().sqrt().item()
            losses[layer] = relative(fixed, mixture), ((one - fixed).norm() / mixture.norm()).item(), deviation
        moved = expected(images)
        before = plain(images)
    last = []
    for vit in (encoder.vit, expected, plain):  # features are the last block's, before the final norm
        vit.blocks[-1].register_forward_hook(lambda _, args, output: last.append(output))
    with torch.no_grad():
        encoder(images, QUESTIONS), expected(images), plain(images)
    vit, report = covft.merge(encoder, data)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), moved, rtol=1e-6, atol=1e-6)
    mixed, merged, untuned = last[:3]
    assert report.total.features == pytest.approx(relative(merged, mixed), rel=1e-4)
    assert report.total.tuning == pytest.approx(relative(untuned, mixed), rel=1e-4)
    rows = [0, 2]
    assert report.kinds["where"].features == pytest.approx(relative(merged[rows], mixed[rows]), rel=1e-4)
    for layer, (by_routing, by_averaging, deviation) in losses.items():
        loss = report.blocks[layer]
        assert loss.weights == pytest.approx(means[layer].tolist(), rel=1e-5)
        assert loss.routing == pytest.approx(by_routing, rel=1e-4, abs=1e-9)
        assert loss.averaging == pytest.approx(by_averaging, rel=1e-4)
        assert loss.deviation == pytest.approx(deviation, rel=1e-4, abs=1e-9)
    assert min(relative(moved, wanted), relative(before, wanted)) > 1e-3
    assert "lost by routing" in str(report)
    assert report.to_dict()["blocks"]["1"]["weights"] == pytest.approx(means[1].tolist(), rel=1e-5)


def test_the_report_says_what_is_lost_where():
    """Routing by kind alone: all variance is between kinds. Experts that share a first layer lose none by averaging."""
    _, encoder = wrapped(context="text", train_norms="none")
    torch.manual_seed(2)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    asked = [QUESTIONS[0], QUESTIONS[1]] * 2
    with torch.no_grad():
        encoder(images, asked)
        for layer, slot in encoder.slots().items():
            one, other = encoder.context_vectors()[layer][:2]
            apart = 4 * (one - other) / (one - other).square().sum()
            slot.router.gate.weight.copy_(torch.stack([apart, -apart, 0 * apart]))
            slot.router.gate.bias.copy_(-slot.router.gate.weight @ (one + other) / 2)
            for expert in slot.experts:
                expert.fc2.weight.add_(0.3 * torch.randn_like(expert.fc2.weight))
    one, other = torch.tensor([[2.0, -2, 0], [-2.0, 2, 0]], dtype=torch.float64).softmax(-1)
    _, report = covft.merge(encoder, [(images, asked, ["where", "count"] * 2)])
    for loss in report.blocks.values():
        assert loss.weights == pytest.approx(((one + other) / 2).tolist(), abs=1e-6)
        assert loss.deviation == pytest.approx(((one - other) / 2).norm().item(), abs=1e-6)
        assert loss.between_kinds == pytest.approx(1, abs=1e-9)
        assert loss.averaging < 1e-6
        assert loss.routing > 0.01


def test_random_routing_has_equal_means():
    _, encoder = wrapped(routing="random", top_k=1)
    spread(encoder)
    _, report = covft.merge(encoder, samples()[1])
    assert all(loss.weights == pytest.approx([1 / 3] * 3) for loss in report.blocks.values())


def test_low_rank_experts_and_updates_of_attentions_are_folded():
    plain, encoder = wrapped(expert_rank=2, attention_rank=2, train_norms="none")
    spread(encoder, 0.3)
    twin = copy.deepcopy(encoder)
    vit, report = covft.merge(encoder, samples()[1])
    means = {layer: loss.weights for layer, loss in report.blocks.items()}
    layer = 2
    slot = twin.slots()[layer]
    first, last = slot.experts.differences
    dense = plain.blocks[layer].mlp.fc1.weight + sum(
        g * up @ down for g, up, down in zip(means[layer], first.up, first.down, strict=True)
    )
    torch.testing.assert_close(vit.blocks[layer].mlp.fc1.weight, dense.detach(), rtol=1e-9, atol=1e-9)
    bias = plain.blocks[layer].mlp.fc2.bias + sum(g * b for g, b in zip(means[layer], last.bias, strict=True))
    torch.testing.assert_close(vit.blocks[layer].mlp.fc2.bias, bias.detach(), rtol=1e-9, atol=1e-9)
    update = twin.vit.blocks[layer].attn.qkv.covft_update
    wanted = plain.blocks[layer].attn.qkv.weight + 2 * update.up @ update.down
    torch.testing.assert_close(vit.blocks[layer].attn.qkv.weight, wanted.detach(), rtol=1e-9, atol=1e-9)
    assert list(vit.state_dict()) == list(plain.state_dict())


def test_distillation_comes_closer_is_seeded_and_touches_nothing_else():
    results = []
    for _ in range(2):
        plain, encoder = wrapped(dtype=torch.float32)
        spread(encoder, 0.1)
        kept = {n: p.clone() for n, p in encoder.vit.named_parameters() if n in encoder.norms}
        _, data = samples(dtype=torch.float32)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        vit, report = covft.merge(encoder, data, distill=30, lr=1e-3, batch_size=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert report.total.features < 0.8 * report.undistilled.features
        assert len(report.losses) == 30
        assert report.losses[-1] < report.losses[0]
        assert all(torch.equal(vit.get_parameter(name), value) for name, value in kept.items())
        for name, parameter in vit.named_parameters():
            assert parameter.grad is None
            if ".mlp." not in name and name not in kept:
                assert torch.equal(parameter, plain.get_parameter(name))
        results.append(torch.cat([p.flatten() for p in vit.parameters()]))
    assert torch.equal(*results)


def test_half_precision_keeps_its_type():
    _, encoder = wrapped("hf-clip", torch.bfloat16)
    encoder.train_in_float32()
    spread(encoder, 0.1)
    vit, report = covft.merge(encoder, samples("hf-clip", torch.bfloat16)[1], distill=2)
    assert {p.dtype for p in vit.parameters()} == {torch.bfloat16}
    assert 0 < report.total.features < 1


def test_what_cannot_be_merged_is_refused_and_nothing_changes():
    _, encoder = wrapped()
    _, data = samples()
    with pytest.raises(MergeError, match=r"depend on the image and the text"):
        covft.merge(encoder)
    before = snapshot(encoder.vit)
    with pytest.raises(ConfigError, match="no sample"):
        covft.merge(encoder, [])
    with pytest.raises(ConfigError, match="distillation"):
        covft.merge(encoder, data, distill=-1)
    encoder.strength = 0.5
    with pytest.raises(MergeError, match="strength"):
        covft.merge(encoder, data)
    encoder.strength = 1
    covft.skip_experts(encoder, 0.1)
    with pytest.raises(MergeError, match="skipped"):
        covft.merge(encoder, data)
    covft.skip_experts(encoder, 0)
    assert_unchanged(encoder.vit, before)
    with torch.no_grad():
        next(encoder.slots()[1].experts[1].parameters()).fill_(torch.nan)
    with pytest.raises(MergeError, match="finite"):
        covft.merge(encoder, data)
    covft.unwrap(encoder)
    with pytest.raises(UnsupportedViTError, match="unwrapped already"):
        covft.merge(encoder, data)
    with pytest.raises(ConfigError, match="exact"):
        covft.merge(covft.tune(BY_NAME["hf-clip"].build(), "lora"), data)


def test_experts_that_peft_has_changed_are_refused():
    peft = pytest.importorskip("peft")
    _, encoder = wrapped("hf-clip", torch.float32)
    perturb(encoder)
    peft.get_peft_model(encoder.vit, peft.LoraConfig(r=2, target_modules=["fc1"], task_type=None))
    with pytest.raises(MergeError, match="FFN's copies"):
        covft.merge(encoder, samples("hf-clip", torch.float32)[1])
