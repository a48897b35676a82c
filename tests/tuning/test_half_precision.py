"""Weights of a tower in half precision that a method trains: kept in float32, and run in half precision."""

import copy
import pickle

import pytest
import torch

from covft.tuning import load, methods, tune, untune
from tests.helpers.recomputing import recompute
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.tuned import FAMILIES, OPTIONS, answer, taken_by, tower_of, tuned_of

OWN = ("full", "bitfit", "layernorm", "last_layers", "top_layer", "ffn")
RATE = 2e-5  # LLaVA's, of instruction tuning
LONG = pytest.mark.long


def tuned(method, name="hf-clip", dtype=torch.bfloat16):
    tower, vit = tower_of(name)
    return tower, tune(vit.to(dtype), method, **OPTIONS.get(method, {}))


def gradients(encoder, tower, images):
    encoder.zero_grad()
    torch.manual_seed(3)
    answer(encoder, tower, images).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in encoder.vit.named_parameters() if p.grad is not None}


def moved(encoder, tower, images, steps=10):
    """The share of the elements with a gradient that some steps of AdamW change, of each tensor that has any."""
    before = {name: p.detach().clone() for name, p in encoder.adapted_parameters().items()}
    optimizer = torch.optim.AdamW(encoder.param_groups(lr=RATE))
    for _ in range(steps):
        found = gradients(encoder, tower, images)
        optimizer.step()
    reached = {name: gradient != 0 for name, gradient in found.items() if name in before}
    changed = {name: encoder.vit.get_parameter(name) != before[name] for name in reached}
    return sum(int((changed[n] & reached[n]).sum()) for n in reached) / sum(int(r.sum()) for r in reached.values())


@pytest.mark.long
def test_those_are_all_that_train_weights_of_the_tower():
    _, vit = tower_of("hf-clip")
    trained = set()
    for method in taken_by("hf-clip", methods()):
        encoder = tuned_of(method, vit)
        trained |= {method} if encoder.change.trained else set()
        untune(encoder)
    assert trained == set(OWN)


@pytest.mark.parametrize("method", [m if m == "full" else pytest.param(m, marks=LONG) for m in OWN])
def test_at_llavas_learning_rate_practically_all_elements_move(method):
    shares = []
    for wide in (False, True):
        tower, encoder = tuned(method)
        assert encoder.train_in_float32() == len(encoder.change.trained) if wide else True
        shares.append(moved(encoder, tower, tower.images(3, torch.bfloat16)))
    assert shares[0] < 0.7
    assert shares[1] > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=LONG)])
@pytest.mark.parametrize("name", [n if n == "hf-clip" else pytest.param(n, marks=LONG) for n in FAMILIES])
@pytest.mark.parametrize("method", ["full", pytest.param("bitfit", marks=LONG)])
def test_the_tower_computes_as_before_recomputed_or_not_and_comes_back(method, name, dtype):
    tower, vit = tower_of(name)
    vit.to(dtype)
    images = tower.images(3, dtype)
    plain = answer(vit, tower, images)  # transformers installs its own hooks in the first call
    before = snapshot(vit)
    encoder = tune(vit, method)
    expected = gradients(encoder, tower, images)
    encoder.train_in_float32()
    assert encoder.train_in_float32() == 0
    assert torch.equal(answer(encoder, tower, images), plain)
    for on in (False, True):
        if on and hasattr(vit, "set_grad_checkpointing"):
            vit.set_grad_checkpointing(True)
        elif on:
            recompute(vit)
        found = gradients(encoder, tower, images)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key], gradient.float()), key
    moved(encoder, tower, images, steps=1)
    untune(encoder)
    assert_unchanged(vit, before, without=("hooks", "attributes"))
    assert {p.dtype for p in vit.parameters()} == {dtype}
    assert not any("forward" in vars(m) and "covft" in type(vars(m)["forward"]).__module__ for m in vit.modules())
    assert torch.equal(answer(vit, tower, images), plain)


def test_copies_saved_and_merged_ones_have_the_outputs(tmp_path):
    tower, encoder = tuned("full")
    base = copy.deepcopy(tower_of("hf-clip")[1].bfloat16())
    images = tower.images(3, torch.bfloat16)
    encoder.train_in_float32()
    moved(encoder, tower, images, steps=3)
    last = answer(encoder, tower, images)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(answer(other, tower, images), last)
        other.vit.get_parameter(other.change.trained[0]).data.zero_()
    encoder.save_pretrained(tmp_path / "tuned")
    assert torch.equal(answer(load(tmp_path / "tuned", vit=base), tower, images), last)
    encoder.vit.save_pretrained(tmp_path / "plain")
    plain = type(encoder.vit).from_pretrained(tmp_path / "plain", dtype="auto").eval()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert torch.equal(answer(plain, tower, images), last)
    vit = encoder.merge()
    assert {p.dtype for p in vit.parameters()} == {torch.bfloat16}
    assert torch.equal(answer(vit, tower, images), last)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=LONG), torch.float64])
@pytest.mark.parametrize("method", [m if m in ("full", "bitfit") else pytest.param(m, marks=LONG) for m in OWN])
def test_a_later_cast_is_followed(method, dtype, tmp_path):
    tower, encoder = tuned(method)
    before = [name for name, _ in encoder.vit.named_buffers()]
    encoder.train_in_float32()
    moved(encoder, tower, tower.images(3, torch.bfloat16), steps=1)
    encoder.to(dtype)
    plain = tower_of("hf-clip")[1].to(dtype)
    plain.load_state_dict(encoder.vit.state_dict())
    images = tower.images(3, dtype)
    output = answer(encoder, tower, images)
    assert output.dtype == dtype
    assert torch.equal(answer(plain, tower, images), output)
    encoder.save_pretrained(tmp_path)
    assert torch.equal(answer(load(tmp_path, vit=tower_of("hf-clip")[1].bfloat16().to(dtype)), tower, images), output)
    vit = untune(encoder)
    assert {p.dtype for p in vit.parameters()} == {dtype}
    assert [name for name, _ in vit.named_buffers()] == before
