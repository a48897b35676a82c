import copy
import math

import numpy as np
import pytest
import torch

import covft
from covft.analysis.stats.distance import parameter_distance
from covft.errors import ShapeError
from covft.testing import ToyViT


@pytest.fixture
def towers():
    start = ToyViT(depth=3)
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    for tower in (first, second):
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return start, first, second


def flat(tower, block):
    """The weights of a block in one vector, or those outside the blocks."""
    state = tower.state_dict()
    names = [name for name in state if name.startswith(f"{block}." if block else "blocks.") == bool(block)]
    return np.concatenate([state[name].double().numpy().ravel() for name in names])


def test_every_block_is_that_of_the_flat_vectors(towers):
    start, first, second = towers
    found = parameter_distance(first, second, start)
    assert set(found.blocks) == {"", "blocks.0", "blocks.1", "blocks.2"}
    for block, one in found.blocks.items():
        a, b, s = (flat(tower, block) for tower in (first, second, start))
        assert one.distance == pytest.approx(np.linalg.norm(a - b))
        assert one.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(s))
        cosine = (a - s) @ (b - s) / np.linalg.norm(a - s) / np.linalg.norm(b - s)
        assert one.cosine == pytest.approx(cosine)
        assert one.parameters == len(a)
    squares = sum(one.distance**2 for one in found.blocks.values())
    assert found.total.distance == pytest.approx(math.sqrt(squares))
    assert found.total.parameters == sum(p.numel() for p in first.parameters())


def test_state_dicts_are_grouped_by_their_names_as_the_towers_by_their_description(towers):
    _, first, second = towers
    of_towers = parameter_distance(first, second)
    assert parameter_distance(first.state_dict(), second.state_dict()) == of_towers
    assert of_towers.total.cosine is None, "without a start there are no changes to compare"


def test_equal_towers_are_not_apart_and_opposite_changes_have_cosine_minus_one(towers):
    start, first, _ = towers
    assert parameter_distance(first, first).total.distance == 0
    opposite = {name: 2 * value - first.state_dict()[name] for name, value in start.state_dict().items()}
    assert parameter_distance(first, opposite, start).total.cosine == pytest.approx(-1)


def test_wrapped_towers_are_compared_with_their_experts():
    one, two = (covft.wrap(ToyViT(depth=3), 8, layers=[1]) for _ in range(2))
    found = parameter_distance(one, two)
    assert found.blocks["blocks.1"].parameters == sum(p.numel() for p in one.vit.blocks[1].parameters())


def test_other_tensors_are_refused(towers):
    _, first, _ = towers
    with pytest.raises(ShapeError, match="other tensors"):
        parameter_distance(first, ToyViT(depth=2))
    with pytest.raises(ShapeError, match="another shape in start"):
        parameter_distance(first, first, ToyViT(depth=3, width=8))
