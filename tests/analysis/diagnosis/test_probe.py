import copy

import numpy as np
import pytest
import torch
from torch import nn

from covft.analysis.diagnosis.entries import split
from covft.analysis.diagnosis.probe import RANK, probe
from tests.helpers.snapshots import assert_unchanged, snapshot


class Linear(nn.Module):
    """Two kinds of samples that want the same weights, or opposite ones."""

    def __init__(self, width=24):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout()

    def loss(self, samples):
        return torch.stack([(self.dropout(x @ self.weight + self.bias) - y).square().mean() for x, y in samples]).mean()


def planted(sign, count=24, width=24):
    target = torch.randn(width, 2) @ torch.randn(2, width)  # of low rank
    xs = [torch.randn(width) for _ in range(count)]
    kinds = ["a", "b"] * (count // 2)
    return [(x, x @ target * (1 if kind == "a" else sign)) for x, kind in zip(xs, kinds, strict=True)], kinds


@torch.no_grad()
def mean_loss(model, samples, numbers):
    return np.mean([float(model.loss([samples[number]])) for number in numbers])


@pytest.fixture
def model():
    return Linear().train()


def weights(model):
    return {0: {"weight": model.weight, "bias": model.bias}}


def test_changes_are_those_of_a_plain_loop(model):
    samples, kinds = planted(-1.0)
    train, held_out = split(kinds, 0)
    copied = copy.deepcopy(model).eval()
    before = {kind: mean_loss(copied, samples, own) for kind, own in held_out.items()}
    # A batch of all samples of a kind: the order does not matter.
    whole = probe(model, model.loss, samples, kinds, weights(model), steps=1, batch=6, rate=0.01)
    assert whole.before == pytest.approx(before)
    assert whole.held_out == {"a": 6, "b": 6}
    optimizer = torch.optim.AdamW(copied.parameters(), lr=0.01, weight_decay=0.0)
    copied.loss([samples[i] for i in train["a"]]).backward()
    optimizer.step()
    for kind, own in held_out.items():
        after = mean_loss(copied, samples, own)
        assert whole.alone["a"][kind].mean == pytest.approx(after - before[kind], rel=1e-4)


def test_opposite_kinds_harm_each_other_and_equal_ones_help(model):
    samples, kinds = planted(-1.0, count=100)
    found = probe(model, model.loss, samples, kinds, weights(model), steps=10, rate=1e-3)
    for one, other in (("a", "b"), ("b", "a")):
        assert found.alone[one][one].high < 0 < found.alone[one][other].low
    same, kinds = planted(1.0, count=100)
    found = probe(model, model.loss, same, kinds, weights(model), steps=10)
    assert all(change.high < 0 for changes in found.alone.values() for change in changes.values())
    assert found.gain.low > 0
    assert found.gain.mean == pytest.approx(-np.mean([c.mean for c in found.joint.values()]))
    assert found.rate == 1e-3, "the largest lowers the loss most here"


def test_a_change_of_low_rank_keeps_its_gain(model):
    assert RANK < 24
    samples, kinds = planted(1.0, count=48)
    found = probe(model, model.loss, samples, kinds, weights(model), steps=10, rate=1e-3)
    assert 0.5 < found.kept.mean < 1.1
    assert found.kept.low <= found.kept.mean <= found.kept.high


def test_nothing_is_left_of_it(model):
    samples, kinds = planted(-1.0)
    model.bias.requires_grad_(False)
    model.dropout.eval()
    before, state = snapshot(model), torch.get_rng_state()
    probe(model, model.loss, samples, kinds, weights(model), steps=2, rate=0.1)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    calls = []

    def broken(chosen):
        calls.append(chosen)
        if len(calls) > 30:
            raise OSError("no picture")
        return model.loss(chosen)

    with pytest.raises(OSError, match="no picture"):
        probe(model, broken, samples, kinds, weights(model), steps=20, rate=0.1)
    assert_unchanged(model, before)


def test_weights_of_half_precision_are_trained_in_float32(model):
    samples, kinds = planted(1.0)
    half = [(x.bfloat16(), y.bfloat16()) for x, y in samples]
    model.bfloat16()
    nn.init.ones_(model.weight)
    before = snapshot(model)
    found = probe(model, model.loss, half, kinds, weights(model), steps=8, rate=1e-3)  # a step is less than rounding
    assert found.gain.mean != 0
    assert_unchanged(model, before)
