"""Updates of attentions beside adapted FFNs."""

import copy
import re

import pytest
import torch
from torch import nn

import covft
from covft.checkpoints.fingerprint import fingerprint
from covft.errors import CheckpointError, ConfigError, UnsupportedViTError
from covft.surgery.attention import updated_layers
from covft.tuning import budget
from covft.utils.transformers_names import loading_options
from tests.helpers.recomputing import recompute
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME, TEXT_DIM, features, perturb

NAMES = ["timm-clip", "hf-clip", "hf-dinov3", "hf-internvl", "hf-qwen2.5-vl"]
LAYERS, RANK = [1, 2], 2


def wrapped(name, **settings):
    tower = BY_NAME[name]
    torch.manual_seed(0)
    vit = tower.build().double().eval()
    perturb(vit)
    return tower, vit, covft.wrap(vit, TEXT_DIM, layers=LAYERS, **{"attention_rank": RANK, **settings})


def disturb(encoder, part="attention"):
    with torch.no_grad():
        for name, parameter in encoder.vit.named_parameters():
            if encoder.part_of(name) == part:
                parameter.add_(0.1 * torch.randn_like(parameter))


def answer(model, tower, images, *text):
    return features(model(images, *text, **tower.inputs(3)))


def texts():
    return torch.randn(3, TEXT_DIM, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_start_training_saving_and_undoing(name, tmp_path):
    tower = BY_NAME[name]
    torch.manual_seed(0)
    vit = tower.build().double().eval()
    images, text = tower.images(3, torch.float64), texts()
    plain, before, twin = answer(vit, tower, images), snapshot(vit), copy.deepcopy(vit)
    without = {n for n, p in covft.wrap(copy.deepcopy(vit), TEXT_DIM, layers=LAYERS).vit.named_parameters()
               if p.requires_grad}  # fmt: skip

    encoder = covft.tune(vit, "covft", text_encoder=TEXT_DIM, layers=LAYERS, attention_rank=RANK)
    torch.testing.assert_close(answer(encoder, tower, images, text), plain)
    trained = {n for n, p in vit.named_parameters() if p.requires_grad}
    added = trained - without
    assert trained > without
    paths = updated_layers(vit)
    assert added == {f"{path}.covft_update.{part}" for path in paths for part in ("up", "down")}
    blocks = tuple(f"{encoder.spec.blocks[layer].path}." for layer in LAYERS)
    slots = tuple(f"{encoder.spec.blocks[layer].mlp_path}." for layer in LAYERS)
    assert all(path.startswith(blocks) and not path.startswith(slots) for path in paths)
    linears = [vit.get_submodule(path) for path in paths]
    assert all(type(linear) is nn.Linear for linear in linears)
    number = sum(RANK * (linear.in_features + linear.out_features) for linear in linears)
    assert sum(vit.get_parameter(n).numel() for n in added) == number
    groups = encoder.param_groups(lr=1.0)
    assert sum(p.numel() for g in groups if g["name"].startswith("attention/") for p in g["params"]) == number

    disturb(encoder)
    output = answer(encoder, tower, images, text)
    assert not torch.allclose(output, plain)
    output.square().sum().backward()
    assert all(bool(vit.get_parameter(n).grad.any()) for n in added if "k_proj" not in n)
    copied = copy.deepcopy(encoder)
    assert torch.equal(answer(copied, tower, images, text), output)
    encoder.save_pretrained(tmp_path)
    again = covft.load(tmp_path, vit=twin, text_encoder=TEXT_DIM)
    assert again.covft_config.attention_rank == RANK
    assert torch.equal(answer(again, tower, images, text), output)
    assert covft.untune(encoder) is vit
    assert_unchanged(vit, before, without=("hooks", "attributes"))
    assert torch.equal(answer(vit, tower, images), plain)


def test_is_lora_of_peft():
    peft = pytest.importorskip("peft")
    tower, vit, encoder = wrapped("hf-clip")
    twin = copy.deepcopy(encoder)
    disturb(encoder)
    paths = updated_layers(vit)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="|".join(map(re.escape, paths)))
    peft.inject_adapter_in_model(config, twin.vit)
    with torch.no_grad():
        for path in paths:
            layer, update = twin.vit.get_submodule(path), vit.get_submodule(f"{path}.covft_update")
            layer.lora_A["default"].weight.copy_(update.down)
            layer.lora_B["default"].weight.copy_(update.up)
    images, text = tower.images(3, torch.float64), texts()
    torch.testing.assert_close(answer(encoder, tower, images, text), answer(twin, tower, images, text))


@pytest.mark.parametrize("name", ["timm-clip", "hf-clip", "hf-qwen2.5-vl"])
def test_recomputing_changes_no_gradient(name):
    tower, vit, encoder = wrapped(name)
    encoder.train()
    disturb(encoder)
    disturb(encoder, "experts")
    images, one, other = tower.images(3, torch.float64), texts(), texts()
    gradients = []
    for on in (False, True):
        if on and hasattr(vit, "set_grad_checkpointing"):
            vit.set_grad_checkpointing(True)
        elif on:
            recompute(vit)
        encoder.zero_grad()
        losses = [answer(encoder, tower, images, text).square().sum() for text in (one, other)]
        (losses[0] + 2 * losses[1]).backward()
        gradients.append({n: p.grad.clone() for n, p in vit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_save_pretrained_of_transformers_writes_the_plain_tower(tmp_path):
    _, vit, encoder = wrapped("hf-clip")
    disturb(encoder)
    vit.save_pretrained(tmp_path)
    double = loading_options({"dtype": torch.float64})
    base = fingerprint(type(vit).from_pretrained(tmp_path, **double).state_dict().items())
    covft.unwrap(encoder)
    assert fingerprint(vit.state_dict().items()) == base


def test_half_precision_trains_in_float32():
    tower = BY_NAME["hf-clip"]
    encoder = covft.wrap(tower.build().bfloat16(), TEXT_DIM, layers=LAYERS, attention_rank=RANK)
    encoder.train_in_float32()
    disturb(encoder)
    output = answer(encoder, tower, tower.images(3, torch.bfloat16), texts().bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    updates = [p for n, p in encoder.vit.named_parameters() if encoder.part_of(n) == "attention"]
    assert updates
    assert all(p.dtype == torch.float32 and p.grad is not None and bool(p.grad.isfinite().all()) for p in updates)


def test_what_cannot_be_updated_is_refused_and_nothing_changes():
    peft = pytest.importorskip("peft")
    vit = BY_NAME["open_clip-native"].build()
    before = snapshot(vit)
    with pytest.raises(UnsupportedViTError, match="attention_rank"):
        covft.wrap(vit, TEXT_DIM, layers=LAYERS, attention_rank=RANK)
    with pytest.raises(ConfigError, match="attention_rank"):
        covft.wrap(vit, TEXT_DIM, layers=LAYERS, attention_rank=0)
    assert_unchanged(vit, before)
    vit = BY_NAME["timm-clip"].build()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), vit)
    with pytest.raises(UnsupportedViTError, match="adapters of peft"):
        covft.wrap(vit, TEXT_DIM, layers=LAYERS, attention_rank=RANK)


def test_another_rank_is_refused_when_loading(tmp_path):
    _, _, encoder = wrapped("timm-clip")
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "covft_config.json"
    path.write_text(path.read_text().replace('"attention_rank": 2', '"attention_rank": 3'))
    covft.unwrap(encoder)
    with pytest.raises(CheckpointError):
        covft.load(tmp_path, vit=encoder.vit, text_encoder=TEXT_DIM)


def test_peft_is_kept_off():
    peft = pytest.importorskip("peft")
    _, vit, encoder = wrapped("hf-clip")
    config = peft.LoraConfig(target_modules="all-linear", exclude_modules=covft.lora_exclude(encoder))
    peft.inject_adapter_in_model(config, vit)
    adapted = [n for n, m in vit.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert adapted
    assert not any(path.startswith(tuple(updated_layers(vit))) for path in adapted)


@pytest.mark.long
def test_a_budget_counts_them():
    vit = BY_NAME["timm-clip"].build()
    costs = [budget(vit, "covft", text_dim=TEXT_DIM, layers=LAYERS, attention_rank=rank) for rank in (None, 3)]
    d = 32
    assert costs[1].parameters - costs[0].parameters == len(LAYERS) * 3 * ((d + 3 * d) + (d + d))
    assert costs[1].forward_flops > costs[0].forward_flops
