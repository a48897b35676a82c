"""What is trained of a tower in half precision is kept in float32; outputs, saved models and unwrap keep the type."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import covft
from covft.utils.transformers_names import loading_options
from tests.helpers.checkpoints import WIDTH, clip_vit, wrapped
from tests.helpers.snapshots import assert_unchanged, snapshot

HALF = [torch.bfloat16, torch.float16]


def tower(dtype):
    """A wrapped tower in half precision, images and texts."""
    torch.manual_seed(0)
    encoder = wrapped(clip_vit()).to(dtype).train()
    size = encoder.vit.config.image_size
    return encoder, torch.randn(2, 3, size, size, dtype=dtype), torch.randn(2, WIDTH)


def gradients(encoder, images, texts):
    encoder.zero_grad()
    encoder(images, texts).last_hidden_state.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in encoder.vit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", HALF)
def test_outputs_keep_type_and_value(dtype):
    encoder, images, texts = tower(dtype)
    plain = encoder(images, texts).last_hidden_state
    trained = sum(p.requires_grad for p in encoder.vit.parameters())
    assert encoder.train_in_float32() == trained
    assert encoder.train_in_float32() == 0
    for parameter in encoder.vit.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype)):
        with context:
            output = encoder(images, texts).last_hidden_state
            found = gradients(encoder, images, texts)
        assert output.dtype == dtype
        torch.testing.assert_close(output, plain, rtol=0.05, atol=0.05)
        assert len(found) == trained
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_adapted_ffns_compute_in_the_type_of_their_tokens():
    encoder, images, texts = tower(torch.bfloat16)
    encoder.train_in_float32()
    encoder.set_recompute("none")
    slot = next(iter(encoder.slots().values()))
    seen = []
    slot.experts[0].fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    encoder(images, texts)
    assert seen == [torch.bfloat16]


def test_recomputation_gives_the_same_gradients():
    encoder, images, texts = tower(torch.bfloat16)
    encoder.train_in_float32()
    expected = gradients(encoder, images, texts)
    encoder.gradient_checkpointing_enable()
    found = gradients(encoder, images, texts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_float32_is_left_alone():
    encoder, images, texts = tower(torch.float32)
    before, output = snapshot(encoder.vit), encoder(images, texts).last_hidden_state
    assert encoder.train_in_float32() == 0
    assert_unchanged(encoder.vit, before)
    assert torch.equal(encoder(images, texts).last_hidden_state, output)


def test_frozen_parts_are_left_alone():
    encoder, images, texts = tower(torch.bfloat16)
    for slot in encoder.slots().values():
        slot.experts.requires_grad_(False)
    encoder.train_in_float32()
    for name, parameter in encoder.adapted_parameters().items():
        assert parameter.dtype == (torch.bfloat16 if encoder.part_of(name) == "experts" else torch.float32)
    assert encoder(images, texts).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALF)
def test_unwrap_restores_types_and_values(dtype):
    vit = clip_vit().to(dtype)
    before = snapshot(vit)
    encoder = wrapped(vit)
    encoder.train_in_float32()
    assert_unchanged(covft.unwrap(encoder), before)


def test_unwrap_follows_a_later_cast():
    encoder, _, _ = tower(torch.bfloat16)
    encoder.train_in_float32()
    assert {p.dtype for p in covft.unwrap(encoder.double()).parameters()} == {torch.float64}


def test_copies_work():
    encoder, images, texts = tower(torch.bfloat16)
    encoder.train_in_float32()
    expected = encoder(images, texts).last_hidden_state
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(images, texts).last_hidden_state, expected)


def test_saved_models_have_the_type_of_the_tower(tmp_path):
    from safetensors.torch import load_file

    encoder, images, texts = tower(torch.bfloat16)
    encoder.train_in_float32()
    encoder.vit.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / "covft" / "model.safetensors").values()} == {torch.float32}
    base = type(encoder.vit).from_pretrained(tmp_path, **loading_options({"dtype": torch.bfloat16}))
    loaded = covft.load(tmp_path / "covft", base, WIDTH)
    assert {p.dtype for p in loaded.vit.parameters()} == {torch.bfloat16}
    output = loaded(images, texts).last_hidden_state
    torch.testing.assert_close(output, encoder.eval()(images, texts).last_hidden_state, rtol=0.05, atol=0.05)
