"""Which weights a saved encoder was made for: exact within a type, within rounding across types."""

import json

import pytest
import torch

from covft.checkpoints.fingerprint import difference, fingerprint
from covft.errors import CheckpointError

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def weights(dtype=torch.float32):
    return {
        "patch.weight": torch.randn(8, 3, 4, 4, dtype=dtype),
        "patch.bias": torch.randn(8, dtype=dtype) * 1e-3,
        "block.norm.weight": torch.ones(8, dtype=dtype),
        "block.scale": torch.tensor(0.37, dtype=dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "positions": torch.arange(17),
    }


def of(tensors):
    return fingerprint(tensors.items())


def cast(tensors, dtype):
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", TYPES)
def test_order_and_layout_do_not_matter(dtype):
    tensors = weights(dtype)
    shuffled = dict(reversed(tensors.items()))
    shuffled["patch.weight"] = tensors["patch.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not shuffled["patch.weight"].is_contiguous()
    assert of(shuffled) == of(tensors)
    assert difference(of(tensors), of(shuffled)) is None


@pytest.mark.parametrize("dtype", TYPES)
def test_one_changed_value_is_seen(dtype):
    tensors = weights(dtype)
    before = of(tensors)
    with torch.no_grad():
        tensors["patch.weight"][3, 1, 2, 2] = tensors["patch.weight"][3, 1, 2, 2] * 1.01 + 0.01
    assert difference(before, of(tensors)) == "the same tensors with other values"


def test_one_changed_integer_is_seen():
    tensors = weights()
    before = of(tensors)
    tensors["positions"] = tensors["positions"].flip(0)
    assert difference(before, of(tensors)) == "the same tensors with other values"


def test_exchanged_values_are_seen():
    tensors = {"a": torch.randn(3), "b": torch.randn(3)}
    assert difference(of(tensors), of({"a": tensors["b"], "b": tensors["a"]})) is not None


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "reshaped"])
def test_other_tensors_are_seen(change):
    tensors = weights()
    before = of(tensors)
    if change == "extra":
        tensors["more"] = torch.zeros(1)
    elif change == "reshaped":
        tensors["patch.weight"] = tensors["patch.weight"].flatten(2)
    else:
        moved = tensors.pop("patch.bias")
        if change == "renamed":
            tensors["patch.shift"] = moved
    assert "other tensors" in difference(before, of(tensors))


PAIRS = [(one, other) for one in TYPES for other in TYPES if one != other]


@pytest.mark.parametrize(("saved", "found"), PAIRS)
def test_the_same_weights_in_another_type_are_the_same(saved, found):
    for _ in range(20):
        original = weights()
        assert difference(of(cast(original, saved)), of(cast(original, found))) is None


@pytest.mark.parametrize(("saved", "found"), PAIRS)
def test_other_weights_in_another_type_are_other_weights(saved, found):
    apart = difference(of(cast(weights(), saved)), of(cast(weights(), found)))
    assert "sampled values differ by more than rounding" in apart


def test_weights_that_differ_by_one_percent_are_other_weights_across_types():
    original = weights()
    moved = {n: t * 1.01 if t.is_floating_point() else t for n, t in original.items()}
    assert difference(of(original), of(cast(moved, torch.float16))) is not None
    assert difference(of(cast(original, torch.bfloat16)), of(cast(moved, torch.float16))) is not None


def test_two_changes_of_type_are_tolerated():
    original = weights()
    back = cast(cast(original, torch.bfloat16), torch.float64)
    assert difference(of(original), of(back)) is None


def test_values_beyond_half_precision_do_not_warn():
    original = {"big": torch.tensor([1e30, 1.0, -1e30, 2.0, 3.0])}
    assert difference(of(original), of(original)) is None
    half = of(cast(original, torch.float16))
    assert difference(of(original), half) is not None
    assert difference(half, of(cast(cast(original, torch.float16), torch.float32))) is None


def test_a_fingerprint_is_small_json():
    tensors = {f"{i}.weight": torch.randn(64, 64) for i in range(100)}
    text = json.dumps(of(tensors))
    assert len(text) < 4000
    assert json.loads(text) == of(tensors)


def test_tensors_on_the_meta_device_are_refused():
    with pytest.raises(CheckpointError, match="w is on the meta device"):
        fingerprint([("w", torch.empty(3, device="meta"))])


def test_gradients_and_parameters_do_not_matter():
    value = torch.randn(3)
    assert fingerprint([("w", torch.nn.Parameter(value))]) == fingerprint([("w", value)])
