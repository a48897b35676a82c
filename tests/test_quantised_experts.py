"""Experts in int8, for inference: how far they are off, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import covft
from covft.errors import CheckpointError, MergeError, UnsupportedViTError
from covft.testing import HashTextEncoder, ToyViT, tiny_llava
from tests.helpers.towers import BY_NAME, TOWERS, features, perturb

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
QUESTIONS = ["what is left of the cup?", "where is the dog?"]


def experts_to_int8(vit):
    def chosen(module, name):
        return ".experts." in name and isinstance(module, nn.Linear)

    quantization.quantize_(vit, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)


def weights_of(experts):
    return {name: module.weight for name, module in experts.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.long
@pytest.mark.parametrize("tower", TOWERS, ids=str)
@torch.no_grad()
def test_int8__every_family_is_off_by_rounding_alone(tower):
    torch.manual_seed(0)
    encoder = covft.wrap(tower.build().eval(), HashTextEncoder(16), layers=[1, 2], experts=3)
    perturb(encoder, 0.1)
    images, inputs = tower.images(2), tower.inputs(2)
    slots, seen = encoder.slots(), {}
    for layer, slot in slots.items():
        slot.experts.register_forward_hook(lambda _, *call, layer=layer: seen.update({layer: call}), with_kwargs=True)
    before = features(encoder(images, QUESTIONS, **inputs))
    calls, floats = dict(seen), {layer: weights_of(slot.experts) for layer, slot in slots.items()}
    others = {name: p.clone() for name, p in encoder.vit.named_parameters() if ".experts." not in name}
    experts_to_int8(encoder.vit)
    for layer, slot in slots.items():
        for name, weight in weights_of(slot.experts).items():
            step = floats[layer][name].abs().amax(dim=1, keepdim=True) / 127
            assert ((weight.dequantize() - floats[layer][name]).abs() <= 0.51 * step + 1e-7).all(), name
        args, kwargs, wanted = calls[layer]
        error = (slot.experts(*args, **kwargs) - wanted).norm() / wanted.norm()
        assert 0 < error < 0.015
    for name, parameter in encoder.vit.named_parameters():
        assert ".experts." in name or torch.equal(parameter, others[name]), name
    after = features(encoder(images, QUESTIONS, **inputs))
    assert (after - before).norm() < 0.015 * before.norm()


def quantised(vit):
    torch.manual_seed(0)
    encoder = covft.wrap(vit.eval(), HashTextEncoder(16), layers=[1, 2], experts=3)
    perturb(encoder)
    experts_to_int8(encoder.vit)
    return encoder


def test_int8__what_needs_the_weights_refuses_and_changes_nothing(tmp_path):
    encoder, images = quantised(ToyViT()), torch.rand(2, 3, 16, 16)
    before = encoder(images, QUESTIONS)
    with pytest.raises(CheckpointError, match=r"are quantised[\s\S]*Int8Tensor[\s\S]*save before quantising"):
        encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedViTError, match="are quantised"):
        covft.compress(encoder, rank=2)
    with pytest.raises(MergeError, match="no quantisation"):
        covft.merge(encoder, [(images, QUESTIONS)])
    assert not (tmp_path / "saved").exists()
    assert torch.equal(encoder(images, QUESTIONS), before)


def test_int8__an_attached_model_is_not_saved_in_part(tmp_path):
    tiny = tiny_llava()
    model = covft.attach(tiny.model, HashTextEncoder(16), tokenizer=tiny.tokenizer)
    experts_to_int8(covft.get_encoder(model).vit)
    with pytest.raises(CheckpointError, match="are quantised"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.long
def test_int8__export_computes_what_eager_computes():
    tower = BY_NAME["timm-clip"]
    error = covft.export(quantised(tower.build()), tower.images(2), QUESTIONS).error
    assert error is not None
    assert error < 1e-5
