"""Packed batches: indices by hand, and mixtures that equal the equations image by image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from covft.errors import ShapeError
from covft.nn import ContextualMoE, Routing, Segments
from tests.helpers.mixtures import (
    EXACT,
    VARIANTS,
    assert_same_gradients,
    feed_forward,
    gradients,
    naive,
    random_moe,
    shapes,
)


def test_tokens_find_their_image():
    segments = Segments([2, 3, 1])
    assert (len(segments), segments.num_tokens) == (3, 6)
    assert segments.ids_T.tolist() == [0, 0, 1, 1, 1, 2]
    assert segments.mask_BN.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    tokens = torch.arange(1.0, 7.0)[:, None]
    assert segments.per_image(tokens)[..., 0].tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]


@pytest.mark.parametrize("lengths", [[3, 3], [4], [1, 1, 1]])
def test_images_of_one_length_need_no_mask(lengths):
    segments = Segments(lengths)
    assert segments.mask_BN is None
    tokens = torch.randn(sum(lengths), 5)
    assert torch.equal(segments.per_image(tokens), tokens.view(len(lengths), lengths[0], 5))


def test_lengths_are_sides_multiplied():
    assert Segments.of_sizes(torch.tensor([[1, 4, 6], [3, 2, 2]])).lengths == (24, 12)
    assert Segments.of_sizes(torch.tensor([[28, 56], [29, 41]]), unit=14).lengths == (8, 4)
    assert Segments.of_sizes([(28, 56), torch.Size([14, 14])], unit=14).lengths == (8, 1)


def test_a_device_is_kept_or_changed():
    segments = Segments([2, 3])
    assert segments.to(torch.device("cpu")) is segments
    there = segments.to(torch.device("meta"))
    assert there.lengths == (2, 3)
    assert there.ids_T.is_meta
    assert there.mask_BN.is_meta


def test_a_tokens_decision_is_that_of_its_image():
    routing = Routing(torch.rand(3, 4), torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 4))
    tokens = routing.per_token(torch.tensor([2, 0, 0]))
    assert torch.equal(tokens.weights_BE, routing.weights_BE[[2, 0, 0]])
    assert tokens.expert_ids_BK.tolist() == [[1, 2], [0, 1], [0, 1]]
    assert Routing(torch.rand(3, 4)).per_token(torch.tensor([0, 2])).expert_ids_BK is None


def test_sizes_may_count_squares_of_tokens_and_leave_out_additional_tokens():
    assert Segments.of_sizes(torch.tensor([[1, 2, 3], [2, 1, 1]]), square=2, extra=1).lengths == (25, 9)
    assert Segments.of_sizes([(32, 16), (8, 8)], 8, extra=2).lengths == (10, 3)


def test_merging_divides_the_tokens_of_every_image_alike():
    segments = Segments([16, 8])
    assert segments.merged(6).lengths == (4, 2)
    assert segments.merged(12).lengths == (8, 4)
    # A number that no merging explains changes nothing, and the check of the tokens refuses it.
    assert all(segments.merged(num_tokens) is segments for num_tokens in (24, 23, 8, 5, 1, 0))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("leading", [(), (1,)], ids=["TD", "1TD"])
@pytest.mark.parametrize(("context", "routing"), VARIANTS)
@settings(max_examples=15, deadline=None)
@given(shape=shapes(), data=st.data())
def test_outputs_and_gradients_are_those_of_the_equations(context, routing, leading, shape, data):
    torch.manual_seed(shape["seed"])
    moe = random_moe(shape, context, routing)
    lengths = [data.draw(st.integers(1, shape["N"])) for _ in range(shape["B"])]
    segments = Segments(lengths)
    x = torch.randn(*leading, sum(lengths), shape["D"], dtype=torch.float64, requires_grad=True)
    text = torch.randn(shape["B"], shape["C"], dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    seed = shape["seed"] + 1
    decision, vectors = moe.route(x, text, segments=segments, seed=seed)
    assert decision.weights_BE.shape == (shape["B"], shape["E"])
    assert vectors is None or vectors.shape[0] == shape["B"]

    images = x.flatten(0, -2).split(lengths)
    outputs, gap = naive(moe, images, text, shape, context, routing, expert_ids=decision.expert_ids_BK)
    assume(gap > 1e-6)  # at a tie the choice of a sparse router is arbitrary
    wanted = torch.cat(outputs).view_as(x)
    found = moe(x, text, segments=segments, seed=seed)

    torch.testing.assert_close(found, wanted, **EXACT)
    ours = gradients((found * direction).sum(), moe, x, text)
    theirs = gradients((wanted * direction).sum(), moe, x, text)
    assert_same_gradients(moe, ours, theirs)


def test_other_numbers_of_tokens_or_texts_are_refused():
    moe = ContextualMoE(feed_forward(6, 9, torch.float32), embed_dim=6, text_dim=8)
    segments = Segments([2, 3])
    with pytest.raises(ShapeError, match="5 tokens, of 2 images"):
        moe(torch.zeros(4, 6), torch.zeros(2, 8), segments=segments)
    with pytest.raises(ShapeError, match=r"text features of shape \(2, C\)"):
        moe(torch.zeros(5, 6), torch.zeros(5, 8), segments=segments)


@pytest.mark.parametrize("context", ["cve", "image", "concat"])
def test_an_image_without_tokens_makes_no_nan(context):
    moe = ContextualMoE(
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), embed_dim=8, text_dim=4, context=context
    )
    segments, tokens = Segments([3, 0, 2]), torch.randn(5, 8)
    routing, _ = moe.route(tokens, torch.randn(3, 4), segments=segments)
    assert routing.weights_BE.isfinite().all()
    moe.mix(tokens, routing, segments).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters() if p.grad is not None)
    assert segments.per_image(tokens)[1].abs().max() == 0
