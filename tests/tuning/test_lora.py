"""LoRA and DoRA against peft itself."""

import copy
import re

import peft
import pytest
import torch

from covft.errors import ConfigError, LayerIndexError, UnsupportedViTError
from covft.tuning import tune, untune
from tests.helpers.towers import TOWERS, features
from tests.helpers.tuned import answer, tower_of


@pytest.mark.parametrize("name", ["timm-clip", "hf-siglip"])
@pytest.mark.parametrize("dora", [False, True])
def test_is_that_of_peft_to_the_last_bit(name, dora):
    tower, vit = tower_of(name)
    images, twin = tower.images(3), copy.deepcopy(vit)
    torch.manual_seed(7)
    tuned = tune(vit, "dora" if dora else "lora", r=2, alpha=4.0)
    paths = list(tuned.change.replaced)
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="|".join(map(re.escape, paths)), use_dora=dora)
    theirs = peft.get_peft_model(twin, config)
    ours = {name: p for name, p in tuned.vit.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{name}" for name in ours} == {n for n, p in theirs.named_parameters() if p.requires_grad}
    for model in (tuned, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            answer(model, tower, images).square().sum().backward()
            optimizer.step()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.items():
        assert torch.equal(parameter, other[f"base_model.model.{name}"]), name
    assert torch.equal(answer(tuned, tower, images), answer(theirs, tower, images))


@pytest.mark.parametrize(("targets", "expected"), [("attention", "attn"), ("ffn", "mlp"), ("all", "attn|mlp")])
def test_targets_are_the_linear_layers_of_chosen_blocks(targets, expected):
    _, vit = tower_of("timm-clip")
    tuned = tune(vit, "lora", targets=targets, layers=[1, -1])
    paths = set(tuned.change.replaced)
    linears = {path for path, module in vit.named_modules() if isinstance(module, torch.nn.Linear)}
    plain = {path.removesuffix(".base_layer") for path in linears if "lora_" not in path}
    assert paths == {path for path in plain if re.match(rf"blocks\.(1|3)\.({expected})\.", path)}


def test_the_frozen_weights_of_a_joint_attention_stay_as_they_are():
    """peft's own class for it adds the update to the weights and takes it off again, which rounds them."""
    tower, vit = tower_of("open_clip-native")
    weight = vit.transformer.resblocks[0].attn.in_proj_weight
    before = weight.detach().clone()
    tuned = tune(vit.bfloat16(), "lora", r=2)
    before = weight.detach().clone()
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.add_(torch.randn_like(parameter))
    for _ in range(3):
        answer(tuned, tower, tower.images(3, torch.bfloat16))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 0}, ConfigError),
        ({"targets": "qkv"}, ConfigError),
        ({"dropout": 1.0}, ConfigError),
        ({"layers": [4]}, LayerIndexError),
        ({"rank": 8}, ConfigError),
    ],
)
def test_options_are_checked_before_anything_changes(options, error):
    _, vit = tower_of("timm-clip")
    with pytest.raises(error):
        tune(vit, "lora", **options)
    untune(tune(vit, "lora"))


def test_a_tower_with_adapters_is_refused():
    _, vit = tower_of("timm-clip")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), vit)
    with pytest.raises(UnsupportedViTError, match="adapters"):
        tune(vit, "lora")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tower", TOWERS, ids=str)
def test_every_update_gets_a_gradient(tower):
    """Some attentions read the weight of a linear layer without calling it, past any update."""
    vit = tower.build()
    tuned = tune(vit, "lora", r=2)
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.normal_()
    features(tuned(tower.images(2), **tower.inputs(2))).square().sum().backward()
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name
