"""Distances of experts are those of their outputs on the same tokens, one expert after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import covft
from covft.analysis.stats.divergence import divergence
from covft.testing import ToyViT
from tests.helpers.towers import perturb


def data(count=5):
    return [(torch.randn(3, 16, 16), torch.randn(8)) for _ in range(count)]


def test_fresh_experts_are_equal():
    found = divergence(covft.wrap(ToyViT(), 8, layers=[2]), data())[2]
    assert (found.weights, found.tokens) == (0, 5 * 5)
    assert found.outputs == pytest.approx(0, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"routing": "sparse", "top_k": 1}, {"expert_rank": 2}])
def test_distances_are_those_of_outputs_one_by_one(settings):
    encoder, samples = covft.wrap(ToyViT(), 8, layers=[1], experts=3, **settings), data()
    perturb(encoder)
    slot, tokens = encoder.slots()[1], []
    found = divergence(encoder, samples, batch_size=2)[1]
    handle = slot.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    encoder.eval()(torch.stack([image for image, _ in samples]), torch.stack([text for _, text in samples]))
    handle.remove()
    if "expert_rank" in settings:
        one_hot = torch.eye(3)
        outputs = [
            slot.experts(tokens[0], covft.nn.Routing(one_hot[expert].expand(5, -1))).double() for expert in range(3)
        ]
    else:
        outputs = [expert(tokens[0]).double() for expert in slot.experts]
    mean = sum(outputs) / 3
    spread = sum((y - mean).square().sum() for y in outputs) / sum(y.square().sum() for y in outputs)
    assert found.outputs == pytest.approx(float(spread.sqrt()), rel=1e-4)
    for a in range(3):
        for b in range(3):
            size = (outputs[a].square().sum() + outputs[b].square().sum()) / 2
            apart = float(((outputs[a] - outputs[b]).square().sum() / size).sqrt())
            assert found.pairs[a, b] == pytest.approx(apart, rel=1e-4, abs=1e-7)
    assert np.array_equal(found.pairs, found.pairs.T)
    assert found.weights > 0.01
