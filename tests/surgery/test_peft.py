"""peft in every order: on the ViT before wrap, after it, and taken away before unwrap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import covft
from covft.errors import UnsupportedViTError
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME, TEXT_DIM, features, perturb

peft = pytest.importorskip("peft")

NAMES = ["timm-clip", "hf-clip", "open_clip-native"]
ATTENTION = {"timm-clip": ["qkv", "proj"], "hf-clip": ["q_proj", "v_proj"], "open_clip-native": ["attn"]}
FFN = {"timm-clip": ["fc1"], "hf-clip": ["fc1"], "open_clip-native": ["c_fc"]}
LAYERS = [1, 2]


def lora(targets, **options):
    return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)


def output(vit, images):
    with torch.no_grad():
        return features(vit(images))


def conditioned(encoder, images):
    torch.manual_seed(3)
    return features(encoder(images, torch.rand(len(images), TEXT_DIM)))


@pytest.mark.parametrize("name", NAMES[:2])  # peft's own layer for MultiheadAttention rounds its weights in each call
def test_wrap__adapters_on_the_attention_stay_trained(name):
    tower = BY_NAME[name]
    vit = tower.build()
    peft.get_peft_model(vit, lora(ATTENTION[name]))
    trained = {n for n, p in vit.named_parameters() if p.requires_grad}
    before, images = snapshot(vit), tower.images(2)
    plain = output(vit, images)
    encoder = covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    after = {n for n, p in vit.named_parameters() if p.requires_grad}
    assert trained
    assert trained <= after
    assert all(encoder.part_of(n) != "other" for n in after - trained)  # of the ViT's own, nothing but covft's
    torch.testing.assert_close(conditioned(encoder, images), plain, rtol=1e-4, atol=1e-5)
    conditioned(encoder, images).square().sum().backward()
    assert all(p.grad is not None for p in vit.parameters() if p.requires_grad)
    assert_unchanged(covft.unwrap(encoder), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_wrap__refuses_ffns_with_adapters(name, kind):
    vit = BY_NAME[name].build()
    ffn = covft.describe(vit).blocks[2].mlp
    config = lora(FFN[name]) if kind == "lora" else lora(ATTENTION[name], modules_to_save=[ffn])
    peft.get_peft_model(vit, config)
    before = snapshot(vit)
    with pytest.raises(UnsupportedViTError, match="peft has put adapters into") as caught:
        covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    assert "merge_and_unload" in str(caught.value)
    assert_unchanged(vit, before, ["parameters"])  # which peft's layer for MultiheadAttention makes anew when read


@pytest.mark.parametrize("name", NAMES)
def test_wrap__adapters_in_other_ffns_are_no_matter(name):
    vit = BY_NAME[name].build()
    paths = [block.path for block in covft.describe(vit).blocks]
    peft.get_peft_model(vit, lora(rf".*{paths[0]}\..*{FFN[name][0]}".replace(".0", r"\.0")))
    covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    assert any(p.requires_grad and "lora_" in n for n, p in vit.named_parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_unwrap__after_peft_came_and_went(name, unload):
    """The original FFNs and norms come back, whatever peft has renamed in between."""
    tower = BY_NAME[name]
    vit, images = tower.build(), tower.images(2)
    before, plain = snapshot(vit), output(vit, images)
    encoder = covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    perturb(encoder)
    adapted = peft.get_peft_model(vit, lora([*ATTENTION[name], *FFN[name]]))
    assert getattr(adapted, unload)() is vit
    unwrapped = covft.unwrap(encoder)
    if unload == "unload":
        assert torch.equal(output(unwrapped, images), plain)
        assert snapshot(unwrapped)["trainable"] == before["trainable"]
    else:  # the attention was merged; all else is as before
        changed = [n for n, t in unwrapped.state_dict().items() if not torch.equal(t, before["values"][n])]
        assert changed
        adapted_blocks = tuple(f"{encoder.spec.blocks[layer].mlp_path}." for layer in LAYERS)
        assert not any(n in encoder.norms or n.startswith(adapted_blocks) for n in changed)


@pytest.mark.parametrize("name", NAMES)
def test_unwrap__while_peft_is_there(name):
    tower = BY_NAME[name]
    vit = tower.build()
    original = copy.deepcopy(vit)
    encoder = covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    perturb(encoder)
    adapted: Any = peft.get_peft_model(vit, lora(ATTENTION[name]))
    covft.unwrap(encoder)
    trained = [n for n, p in vit.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)  # peft's choice; FFNs and norms came back frozen
    adapted.unload()
    after = vit.state_dict()
    assert all(torch.equal(after[key], value) for key, value in original.state_dict().items())
    images = tower.images(2)
    vit.requires_grad_(True)  # frozen, torch's MultiheadAttention takes another kernel on some CPUs
    assert torch.equal(output(vit, images), output(original, images))


@pytest.mark.parametrize("name", NAMES)
def test_unwrap__of_adapters_that_were_there_before_wrap(name):
    tower = BY_NAME[name]
    vit = tower.build()
    adapted: Any = peft.get_peft_model(vit, lora(ATTENTION[name]))
    images = tower.images(2)
    with_adapters = output(vit, images)
    encoder = covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    perturb_slots(encoder)
    adapted.merge_and_unload()
    torch.testing.assert_close(output(covft.unwrap(encoder), images), with_adapters, rtol=1e-4, atol=1e-5)


def perturb_slots(encoder):
    with torch.no_grad():
        for slot in encoder.slots().values():
            for parameter in slot.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_unwrap__with_norms_that_peft_tunes():
    vit: Any = BY_NAME["hf-clip"].build()
    original = copy.deepcopy(vit)
    encoder = covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    perturb(encoder)
    adapted: Any = peft.get_peft_model(vit, peft.LNTuningConfig(target_modules=["layer_norm1"]))
    covft.unwrap(encoder)
    adapted.unload()
    for name, tensor in original.state_dict().items():
        assert torch.equal(vit.state_dict()[name], tensor), name


def test_unwrap__is_refused_where_a_slot_was_replaced_and_nothing_changed():
    vit = BY_NAME["timm-clip"].build()
    encoder = covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    adapted: Any = peft.get_peft_model(vit, lora(["qkv"], modules_to_save=["blocks.2.mlp"]))
    before = snapshot(vit)
    with pytest.raises(UnsupportedViTError, match="replaced or removed parts") as caught:
        covft.unwrap(encoder)
    assert "peft_model.unload()" in str(caught.value)
    assert "blocks.2.mlp" in str(caught.value)
    assert_unchanged(vit, before)
    adapted.unload()
    covft.unwrap(encoder)
    norm = BY_NAME["timm-clip"].build()
    encoder = covft.wrap(norm, TEXT_DIM, layers=LAYERS)
    norm.set_submodule("blocks.1.norm1", nn.Identity())
    before = snapshot(norm)
    with pytest.raises(UnsupportedViTError, match=r"blocks.1.norm1.weight"):
        covft.unwrap(encoder)
    assert_unchanged(norm, before)


def test_lora_exclude__keeps_peft_off_everything_that_was_added():
    vit = BY_NAME["hf-clip"].build()
    encoder = covft.wrap(vit, TEXT_DIM, layers=LAYERS)
    config = lora(r".*(q_proj|fc1|up|gate|fc2)", exclude_modules=covft.lora_exclude(encoder))
    adapted = peft.get_peft_model(vit, config)
    found = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert any("layers.0.mlp.fc1" in name for name in found)
    assert any("layers.1.self_attn.q_proj" in name for name in found)
    assert not any(f"layers.{layer}.mlp" in name for name in found for layer in LAYERS)
