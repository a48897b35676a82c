import copy

import numpy as np
import pytest
import torch

import covft
from covft.analysis.stats.gradients import block_weights, gradients_of
from covft.errors import ConfigError, MissingGradientError, ShapeError, UnsupportedViTError
from covft.testing import ToyViT
from covft.utils.sketch import GradientSketch
from tests.helpers.snapshots import assert_unchanged, snapshot


@pytest.fixture
def vit():
    vit = ToyViT(depth=3)
    vit.blocks[1].requires_grad_(False)
    return vit


def loss(vit):
    return lambda images: vit(images)[:, 1:].square().mean()


@pytest.mark.parametrize("weights", ["ffn", "all"])
def test_gradients_are_the_projected_ones_of_backward(vit, weights):
    vit.double()
    samples = [torch.rand(2, 3, 16, 16, dtype=torch.float64) for _ in range(3)]
    chosen = block_weights(vit, covft.describe(vit), weights)
    found = gradients_of(vit, loss(vit), samples, ["a", "b", "a"], chosen, width=32)
    assert (found.layers, found.kinds, found.vectors.shape) == ((0, 1, 2), ("a", "b", "a"), (3, 3, 32))
    whole = copy.deepcopy(vit).requires_grad_(True)
    sketch = GradientSketch(32)
    for row, images in zip(found.vectors, samples, strict=True):
        whole.zero_grad()
        loss(whole)(images).backward()
        for layer, vector in enumerate(row):
            path = f"blocks.{layer}." if weights == "all" else f"blocks.{layer}.mlp."
            named = {name: p.grad for name, p in whole.named_parameters() if name.startswith(path)}
            np.testing.assert_allclose(vector, sketch(named).numpy(), rtol=1e-5, atol=1e-10)
    assert found.weights[0] == sum(p.numel() for p in chosen[0].values())


def test_the_model_is_as_it_was(vit):
    vit.blocks[0].mlp[0].weight.grad = torch.ones_like(vit.blocks[0].mlp[0].weight)
    before, required = snapshot(vit), [p.requires_grad for p in vit.parameters()]
    gradients_of(vit, loss(vit), [torch.rand(1, 3, 16, 16)], ["a"], block_weights(vit, covft.describe(vit)))
    assert_unchanged(vit, before)
    assert [p.requires_grad for p in vit.parameters()] == required
    assert [p.grad is not None for p in vit.parameters()].count(True) == 1

    def broken(images):
        raise OSError("no picture")

    with pytest.raises(OSError, match="no picture"):
        gradients_of(vit, broken, [None], ["a"], block_weights(vit, covft.describe(vit)))
    assert [p.requires_grad for p in vit.parameters()] == required


def test_blocks_that_are_not_read_have_gradients_of_zero(vit):
    def of_the_first_block(images):
        states = []
        with torch.no_grad():
            vit(images)
        handle = vit.blocks[0].register_forward_hook(lambda module, inputs, output: states.append(output))
        vit(images)
        handle.remove()
        return states[0].square().mean()

    found = gradients_of(
        vit, of_the_first_block, [torch.rand(1, 3, 16, 16)], ["a"], block_weights(vit, covft.describe(vit))
    )
    assert found.vectors[0, 0].any()
    assert not found.vectors[0, 1:].any()
    assert not np.isnan(found.cosines()).any()
    assert found.cosines(1)[0, 0] == 0


def test_a_wrapped_tower_has_its_experts(vit):
    encoder = covft.wrap(vit, 8, layers=[1])
    found = block_weights(encoder.vit, encoder.spec)
    assert any("experts" in name for name in found[1])
    assert not any("experts" in name for name in found[0])


def test_no_more_than_the_projections_is_kept():
    tower = ToyViT(width=64, depth=2)
    chosen = block_weights(tower, covft.describe(tower))
    images = [torch.rand(1, 3, 16, 16)] * 40
    found = gradients_of(tower, loss(tower), images, ["a"] * 40, chosen, width=16)
    assert found.vectors.nbytes == 40 * 2 * 16 * 4
    assert found.vectors.base is None or found.vectors.base.nbytes == found.vectors.nbytes


def test_what_has_no_gradient_is_refused(vit):
    chosen = block_weights(vit, covft.describe(vit))
    with pytest.raises(ConfigError, match="weights='attention'"):
        block_weights(vit, covft.describe(vit), "attention")
    with pytest.raises(ShapeError, match="loss cannot be used"):
        gradients_of(vit, vit, [torch.rand(1, 3, 16, 16)], ["a"], chosen)
    with pytest.raises(ShapeError, match="loss cannot be used"):
        gradients_of(vit, lambda images: loss(vit)(images) * float("nan"), [torch.rand(1, 3, 16, 16)], ["a"], chosen)
    with pytest.raises(MissingGradientError, match="does not depend"):
        gradients_of(vit, lambda images: loss(vit)(images).detach(), [torch.rand(1, 3, 16, 16)], ["a"], chosen)
    with pytest.raises(MissingGradientError, match="does not depend"):
        gradients_of(vit, lambda scale: scale.sum(), [torch.ones(1, requires_grad=True)], ["a"], chosen)
    with pytest.raises(ShapeError, match="not as many as the samples"):
        gradients_of(vit, loss(vit), [torch.rand(1, 3, 16, 16)], ["a", "b"], chosen)
    with pytest.raises(UnsupportedViTError, match="has no values"):
        block_weights(vit.to("meta"), covft.describe(vit))
