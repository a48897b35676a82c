"""Cheaper wrapped ViTs and their errors: recompute, low-rank experts, compression, skipped experts."""

from __future__ import annotations

import copy

import pytest
import torch

import covft
from covft.errors import CheckpointError, ConfigError, UnsupportedViTError
from covft.nn.experts import Experts
from covft.nn.low_rank import LowRankExperts
from tests.helpers.towers import TOWERS, features, perturb

TEXTS = covft.testing.HashTextEncoder(16)
QUESTIONS = ["what is left of the cup?", "how many people are there?", "where is the dog?"]
every_tower = pytest.mark.parametrize("tower", TOWERS, ids=str)
every_routing = pytest.mark.parametrize("routing", ["dense", "sparse", "uniform"])


def wrapped(tower, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    encoder = covft.wrap(tower.build().to(dtype).eval(), TEXTS, layers=[1, 2], experts=3, **settings)
    torch.manual_seed(1)
    perturb(encoder, 0.3)
    return encoder


def called(encoder, tower, dtype=torch.float64):
    torch.manual_seed(2)
    images = tower.images(3, dtype)
    return features(encoder(images, QUESTIONS, **tower.inputs(3)))


def gradients(encoder, tower):
    output = called(encoder, tower)
    torch.manual_seed(3)
    (output * torch.randn_like(output)).sum().backward()
    return output.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}


# recompute


@pytest.mark.long
@every_routing
@every_tower
def test_recompute__changes_no_number(tower, routing):
    encoders = [wrapped(tower, routing=routing, recompute=kind) for kind in ("none", "activation", "all")]
    ways = [{slot.experts.recompute for slot in encoder.slots().values()} for encoder in encoders]
    assert ways == [{"none"}, {"activation"}, {"all"}]
    results = [gradients(encoder, tower) for encoder in encoders]
    (wanted, expected), *others = results
    for output, found in others:
        assert torch.allclose(output, wanted, rtol=1e-10, atol=1e-10)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] is None) == (gradient is None), name
            assert gradient is None or torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize("kind", ["activation", "all"])
def test_recompute__within_activation_checkpointing(kind):
    tower = next(tower for tower in TOWERS if tower.name == "timm-clip")
    wanted, expected = gradients(wrapped(tower, recompute="none"), tower)
    encoder = wrapped(tower, recompute=kind)
    encoder.train()
    encoder.gradient_checkpointing_enable()
    output, found = gradients(encoder, tower)
    assert torch.allclose(output, wanted, rtol=1e-10)
    assert all(torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-12) for name, gradient in expected.items())


@pytest.mark.long
def test_recompute__every_tower_of_the_table_but_those_with_another_ffn_is_fused():
    plans = {}
    for tower in TOWERS:
        slots = wrapped(tower, torch.float32).slots().values()
        plans[tower.name] = all(isinstance(s.experts, Experts) and s.experts.plan is not None for s in slots)
    assert plans["timm-clip"]
    assert sum(plans.values()) >= len(plans) - 2, [name for name, fused in plans.items() if not fused]


def test_recompute__may_be_changed_and_is_shown():
    tower = TOWERS[0]
    encoder = wrapped(tower)
    assert encoder.covft_config.recompute == "all"
    assert "recompute='all'" in repr(encoder)
    encoder.set_recompute("activation")
    assert all(slot.experts.recompute == "activation" for slot in encoder.slots().values())
    assert all(slot.context.image.recompute == "activation" for slot in encoder.slots().values())
    assert encoder.covft_config.recompute == "activation"
    with pytest.raises(ConfigError, match="recompute"):
        encoder.set_recompute("everything")


def test_recompute__experts_that_peft_has_changed_are_called_one_by_one():
    peft = pytest.importorskip("peft")
    tower = next(tower for tower in TOWERS if tower.name == "hf-clip")
    encoder = wrapped(tower, torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["fc1"], task_type=None, init_lora_weights=False)
    adapted = peft.get_peft_model(encoder.vit, config)
    slots = [module for module in adapted.modules() if isinstance(module, Experts)]
    assert all(not slot.plan.applies_to(expert) for slot in slots for expert in slot)
    with encoder.condition(QUESTIONS):
        torch.manual_seed(2)
        output = features(adapted(tower.images(3)))
    output.sum().backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "experts" in name and "lora_" in name)


def test_recompute__a_save_of_one_way_loads_into_another(tmp_path):
    tower = TOWERS[0]
    torch.manual_seed(0)
    base = tower.build().eval()
    encoder = covft.wrap(copy.deepcopy(base), TEXTS, layers=[1, 2], recompute="all")
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    from covft.checkpoints.loading import load_into

    other = covft.wrap(copy.deepcopy(base), TEXTS, layers=[1, 2], recompute="none")
    load_into(other, tmp_path)
    assert torch.allclose(called(other, tower, torch.float32), called(encoder, tower, torch.float32), atol=1e-6)
    with pytest.raises(CheckpointError, match="other settings"):
        load_into(covft.wrap(copy.deepcopy(base), TEXTS, layers=[1, 2], experts=2), tmp_path)


# Low-rank experts


def plain_of(tower):
    torch.manual_seed(0)
    return tower.build().double().eval()


@pytest.mark.long
@every_routing
@every_tower
def test_expert_rank__starts_as_the_vit_and_trains_the_differences(tower, routing):
    vit = plain_of(tower)
    inputs = tower.inputs(3)
    torch.manual_seed(2)
    images = tower.images(3, torch.float64)
    before = features(vit(images, **inputs))
    weights = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    encoder = covft.wrap(vit, TEXTS, layers=[1, 2], experts=3, routing=routing, expert_rank=2)
    assert torch.allclose(features(encoder(images, QUESTIONS, **inputs)), before, rtol=1e-9, atol=1e-9)
    perturb(encoder)
    assert not torch.allclose(features(encoder(images, QUESTIONS, **inputs)), before, rtol=1e-6, atol=1e-7)
    output = features(encoder(images, QUESTIONS, **inputs))
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in encoder.named_parameters():
        if ".experts." in name:
            assert parameter.requires_grad == (".shared." not in name), name
            assert (parameter.grad is None) == (".shared." in name), name
    groups = {group["name"].split("/")[0] for group in encoder.param_groups(1e-3)}
    assert "other" not in groups
    covft.unwrap(encoder)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(features(vit(images, **inputs)), before)


def test_expert_rank__is_saved_and_loaded(tmp_path):
    tower = TOWERS[0]
    vit = plain_of(tower)
    base = copy.deepcopy(vit)
    encoder = covft.wrap(vit, TEXTS, layers=[1, 2], expert_rank=3)
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    again = covft.load(tmp_path, base, TEXTS)
    assert again.covft_config.expert_rank == 3
    assert torch.equal(called(again, tower), called(encoder, tower))


def test_expert_rank__of_zero_is_refused():
    with pytest.raises(ConfigError, match="expert_rank"):
        covft.CoVFTConfig(expert_rank=0)


# Compression


def test_compress__full_rank_is_exact_and_the_report_is_true(tmp_path):
    tower = TOWERS[0]
    vit = plain_of(tower)
    base = copy.deepcopy(vit)
    encoder = covft.wrap(vit, TEXTS, layers=[1, 2], experts=3)
    perturb(encoder, 0.3)
    twin = copy.deepcopy(encoder)
    images = tower.images(3, torch.float64)
    wanted = features(encoder(images, QUESTIONS))
    exact = covft.compress(encoder, 32, images, QUESTIONS)
    assert torch.allclose(features(encoder(images, QUESTIONS)), wanted, rtol=1e-4, atol=1e-4)
    assert max(exact.weight_error.values()) < 1e-5
    assert exact.feature_error < 1e-5
    report = covft.compress(twin, 4, images, QUESTIONS)
    found = features(twin(images, QUESTIONS))
    assert report.feature_error == pytest.approx(((found - wanted).norm() / wanted.norm()).item(), rel=1e-6)
    assert report.output_error.keys() == report.weight_error.keys() == {1, 2}
    assert all(0 < error < 1 for error in (*report.weight_error.values(), *report.output_error.values()))
    experts = [p.numel() for name, p in twin.named_parameters() if ".experts." in name]
    assert report.parameters_after == sum(experts) < report.parameters_before
    assert report.parameters_before == 2 * 3 * sum(p.numel() for p in base.blocks[1].mlp.parameters())
    # It can be saved, loaded and unwrapped like any encoder.
    twin.save_pretrained(tmp_path)
    again = covft.load(tmp_path, copy.deepcopy(base), TEXTS)
    assert torch.equal(features(again(images, QUESTIONS)), found)
    plain = covft.unwrap(twin)
    assert torch.equal(plain(images), base(images))


def test_compress__changes_nothing_if_it_is_refused():
    tower = TOWERS[0]
    encoder = wrapped(tower, expert_rank=2)
    with pytest.raises(UnsupportedViTError, match="of low rank already"):
        covft.compress(encoder, 4)
    encoder = wrapped(tower)
    with pytest.raises(ConfigError, match="expert_rank"):
        covft.compress(encoder, 0)
    assert all(isinstance(slot.experts, Experts) for slot in encoder.slots().values())


def test_compress__without_a_call_reports_only_the_weights():
    encoder = wrapped(TOWERS[0])
    report = covft.compress(encoder, 4)
    assert report.output_error == {}
    assert report.feature_error is None
    assert all(isinstance(slot.experts, LowRankExperts) for slot in encoder.slots().values())


# Skipped experts


def test_skip_experts__leaves_small_weights_out_and_runs_nothing_for_them():
    tower = TOWERS[0]
    encoder = wrapped(tower)
    with torch.no_grad():
        for slot in encoder.slots().values():
            slot.router.gate.bias.copy_(torch.tensor([3.0, 0.0, -3.0]))  # a clear order
            slot.router.gate.weight.mul_(0.01)
    exact = called(encoder, tower)
    covft.skip_experts(encoder, 1e-6)
    assert torch.allclose(called(encoder, tower), exact, rtol=1e-10)
    covft.skip_experts(encoder, 0.2)
    ran = {}
    for layer, slot in encoder.slots().items():
        for index, expert in enumerate(slot.experts):
            expert.register_forward_pre_hook(lambda _, args, key=(layer, index): ran.update({key: len(args[0])}))
    with torch.no_grad():
        output = called(encoder, tower)
    assert {key: rows for key, rows in ran.items() if rows} == {(1, 0): 3, (2, 0): 3}
    assert not torch.allclose(output, exact, rtol=1e-4)
    encoder.train()
    assert torch.allclose(called(encoder, tower), exact, rtol=1e-10)  # training is left alone
    encoder.eval()
    covft.skip_experts(encoder, 0)
    assert torch.allclose(called(encoder, tower), exact, rtol=1e-10)
    with pytest.raises(ConfigError, match="without any expert"):
        covft.skip_experts(encoder, 0.5)
