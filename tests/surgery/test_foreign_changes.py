"""Other code changes a wrapped ViT: what is left works, or the refusal comes before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import covft
from covft.errors import UnsupportedViTError
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME, TEXT_DIM, body, features, perturb


class Wrapped:
    """A wrapped tower whose blocks 1, 2 and 3 are adapted, and the ViT as it was."""

    def __init__(self, name: str = "timm-clip") -> None:
        tower = BY_NAME[name]
        self.vit = tower.build().eval()
        self.before = copy.deepcopy(self.vit)
        self.encoder = covft.wrap(self.vit, TEXT_DIM, layers=[1, 2, 3])
        perturb(self.encoder)
        self.images, self.text = tower.images(2), torch.randn(2, TEXT_DIM)

    def run(self):
        with torch.no_grad():
            return features(self.encoder(self.images, self.text))


PRUNED = {
    "timm-clip": lambda vit: vit.prune_intermediate_layers([2]),
    "open_clip-native": lambda vit: vit.prune_intermediate_layers([2]),
    "hf-clip": lambda vit: setattr(body(vit).encoder, "layers", body(vit).encoder.layers[:3]),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned__what_is_left_works_and_is_unwrapped(name, tmp_path):
    case = Wrapped(name)
    wanted = case.encoder.train()(case.images, case.text)
    del wanted
    weights = case.encoder.routing_weights()
    case.encoder.eval()
    PRUNED[name](case.vit)
    PRUNED[name](case.before)
    case.run()
    assert list(case.encoder.slots()) == [1, 2]
    for layer, found in case.encoder.routing_weights().items():
        assert torch.allclose(found, weights[layer], atol=1e-5)
    assert case.encoder.aux_loss() == 0
    case.encoder.set_recompute("none")
    before = snapshot(case.encoder)
    with pytest.raises(UnsupportedViTError, match=r"(?s)save_pretrained.* is gone"):
        case.encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert_unchanged(case.encoder, before)
    plain = covft.unwrap(case.encoder)
    with torch.no_grad():
        assert torch.equal(features(plain(case.images)), features(case.before(case.images)))
    assert plain.state_dict().keys() == case.before.state_dict().keys()
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in case.before.named_parameters()
    }
    with pytest.raises(UnsupportedViTError, match="unwrapped already"):
        covft.unwrap(case.encoder)


def test_pruned__before_the_first_adapted_block():
    case = Wrapped()
    case.vit.prune_intermediate_layers([0])
    case.run()
    assert case.encoder.slots() == case.encoder.routing_weights() == {}
    assert not list(covft.unwrap(case.encoder)._forward_pre_hooks)


def delete_block(vit: nn.Module) -> None:
    del vit.blocks[2]


def reverse_blocks(vit: nn.Module) -> None:
    vit.blocks = nn.Sequential(*reversed(list(vit.blocks)))


def replace_ffn(vit: nn.Module) -> None:
    vit.blocks[2].mlp = nn.Sequential(nn.Linear(32, 32))


def delete_ffn(vit: nn.Module) -> None:
    vit.blocks[2].mlp = nn.Identity()


@pytest.mark.parametrize("change", [delete_block, reverse_blocks, replace_ffn, delete_ffn], ids=lambda f: f.__name__)
def test_renumbered_or_replaced__keep_their_layers_and_are_not_unwrapped(change, tmp_path):
    case = Wrapped()
    slots = case.encoder.slots()
    change(case.vit)
    case.run()
    left = {layer: slot for layer, slot in slots.items() if any(slot is module for module in case.vit.modules())}
    assert case.encoder.slots() == left
    assert list(case.encoder.routing_weights()) == list(left)
    before = snapshot(case.vit)
    with pytest.raises(UnsupportedViTError, match=r"unwrap\(\) needs the adapted FFNs where wrap\(\) put them"):
        covft.unwrap(case.encoder)
    with pytest.raises(UnsupportedViTError, match="other code has changed the blocks"):
        case.encoder.save_pretrained(tmp_path)
    assert_unchanged(case.vit, before)


def test_new_head_and_size__are_kept_by_unwrap():
    case = Wrapped()
    for vit in (case.vit, case.before):
        torch.manual_seed(0)
        vit.reset_classifier(5)
        vit.set_input_size(img_size=48)
    case.images = torch.randn(2, 3, 48, 48)
    assert case.run().shape == (2, 5)
    assert list(case.encoder.slots()) == [1, 2, 3]
    plain = covft.unwrap(case.encoder)
    with torch.no_grad():
        assert torch.equal(plain(case.images), case.before(case.images))
    assert plain.head.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("context", ["cve", "image"])
def test_open_clips_low_precision__leaves_norms_in_float32(context, dtype):
    from open_clip.model import convert_weights_to_lp

    tower = BY_NAME["open_clip-native"]
    encoder = covft.wrap(tower.build(), TEXT_DIM, context=context)
    perturb(encoder)
    images, text = tower.images(2), torch.randn(2, TEXT_DIM)
    wanted = encoder(images, text)
    convert_weights_to_lp(encoder.vit, dtype)
    assert {p.dtype for p in encoder.trainable_parameters()} == {dtype, torch.float32}
    output = encoder(images.to(dtype), text)
    assert output.dtype == dtype
    assert torch.allclose(output.float(), wanted, atol=0.15)
    output.float().sum().backward()
    found = [parameter.grad for parameter in encoder.trainable_parameters() if parameter.grad is not None]
    assert len(found) > 20
    assert all(gradient.isfinite().all() for gradient in found)
    assert covft.unwrap(encoder)(images.to(dtype)).isfinite().all()
