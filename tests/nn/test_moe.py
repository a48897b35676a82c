"""The contextual mixture against equations (7) to (11), in float64, over random shapes and numbers."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from covft.errors import ShapeError
from covft.nn import ContextualMoE
from tests.helpers import oracle
from tests.helpers.mixtures import (
    CONTEXTS,
    EXACT,
    VARIANTS,
    assert_same_gradients,
    feed_forward,
    gradients,
    naive,
    random_inputs,
    random_moe,
    shapes,
)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("context", "routing"), VARIANTS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes(), activation=st.sampled_from(["gelu", "quick_gelu"]))
def test_outputs_and_gradients_are_those_of_the_equations(context, routing, shape, activation):
    torch.manual_seed(shape["seed"])
    moe = random_moe(shape, context, routing, activation)
    x, text = random_inputs(shape)
    direction = torch.randn_like(x)
    seed = shape["seed"] + 1
    chosen = moe.route(x, text, seed=seed)[0].expert_ids_BK

    outputs, gap = naive(moe, x, text, shape, context, routing, activation, expert_ids=chosen)
    assume(gap > 1e-6)  # at a tie the choice of a sparse router is arbitrary
    wanted = torch.stack(outputs)
    found = moe(x, text, seed=seed)

    torch.testing.assert_close(found, wanted, **EXACT)
    ours = gradients((found * direction).sum(), moe, x, text)
    theirs = gradients((wanted * direction).sum(), moe, x, text)
    assert_same_gradients(moe, ours, theirs)


@pytest.mark.parametrize("context", CONTEXTS)
@settings(max_examples=15, deadline=None)
@given(shape=shapes(), data=st.data())
def test_masked_tokens_change_nothing(context, shape, data):
    torch.manual_seed(shape["seed"])
    moe = random_moe(shape, context)
    x, text = random_inputs(shape)
    lengths = [data.draw(st.integers(1, shape["N"])) for _ in range(shape["B"])]
    mask = torch.arange(shape["N"]) < torch.tensor(lengths)[:, None]
    direction = torch.randn_like(x) * mask[..., None]

    wanted, _ = naive(moe, x, text, shape, context, "dense", lengths=lengths)
    found = moe(x, text, mask_BN=mask)

    for b, length in enumerate(lengths):
        torch.testing.assert_close(found[b, :length], wanted[b], **EXACT)
    ours = gradients((found * direction).sum(), moe, x, text)
    scalar = sum((y * direction[b, : lengths[b]]).sum() for b, y in enumerate(wanted))
    assert_same_gradients(moe, ours, gradients(scalar, moe, x, text))


@pytest.mark.parametrize("num_images", [1, 3])
def test_an_experts_gradient_is_its_weight_times_its_gradient_alone(num_images):
    """Eq. 11; with several images the sum over images, each with its own weight."""
    shape = {"B": num_images, "N": 5, "D": 6, "C": 8, "F": 9, "E": 4, "K": 2, "H": 4}
    moe = random_moe(shape)
    with torch.no_grad():
        moe.router.gate.weight *= 0.2  # so that every expert has a noticeable share
    x, text = random_inputs(shape)
    direction = torch.randn_like(x)
    weights = moe.route(x, text)[0].weights_BE.detach()
    (moe(x, text) * direction).sum().backward()
    for e, ffn in enumerate(moe.experts):
        wanted = [torch.zeros_like(parameter) for parameter in ffn.parameters()]
        for b in range(num_images):
            alone = (oracle.expert(x[b].detach(), ffn) * direction[b]).sum()
            for total, gradient in zip(wanted, torch.autograd.grad(alone, list(ffn.parameters())), strict=True):
                total += weights[b, e] * gradient
        for parameter, gradient in zip(ffn.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **EXACT)
            assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize(("context", "routing"), VARIANTS)
def test_at_the_start_the_output_is_that_of_the_ffn(context, routing):
    ffn = feed_forward(6, 9)
    moe = ContextualMoE(ffn, embed_dim=6, text_dim=8, routing=routing, context=context, num_experts=3)
    x, text = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(moe(x, text), ffn(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("context", "routing"), VARIANTS)
def test_submodules_that_a_variant_does_not_use_do_not_exist(context, routing):
    moe = ContextualMoE(feed_forward(6, 9), embed_dim=6, text_dim=8, routing=routing, context=context)
    parts = {
        "cve": {"context.image", "context.text", "context.attention"},
        "image": {"context.image"},
        "text": {"context.text"},
        "concat": {"context.image", "context.text"},
    }[context]
    learned = routing in ("dense", "sparse")
    wanted = parts | {"router.gate"} if learned else set()
    found = {".".join(n.split(".")[:2]) for n, _ in moe.named_parameters() if not n.startswith("experts.")}
    assert found == wanted
    assert moe.needs_text == (learned and context != "image")


def test_the_text_may_be_left_out_where_it_is_not_used():
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for context, routing in [("image", "dense"), ("image", "sparse"), ("cve", "uniform"), ("cve", "random")]:
        moe = ContextualMoE(feed_forward(6, 9), embed_dim=6, text_dim=None, routing=routing, context=context)
        assert moe(x).shape == x.shape


@pytest.mark.parametrize("text", [None, torch.zeros(3, 8), torch.zeros(8), torch.zeros(2, 1, 8)])
def test_text_of_another_batch_is_refused(text):
    moe = ContextualMoE(feed_forward(6, 9, torch.float32), embed_dim=6, text_dim=8)
    with pytest.raises(ShapeError, match=r"Expected: text features of shape \(2, C\)"):
        moe(torch.zeros(2, 3, 6), text)


def test_tokens_on_a_grid_are_the_same_tokens_in_a_row():
    shape = {"B": 2, "N": 12, "D": 6, "C": 8, "F": 9, "E": 3, "K": 2, "H": 4}
    moe = random_moe(shape)
    x, text = random_inputs(shape)
    grid = moe(x.view(2, 3, 4, 6), text)
    assert grid.shape == (2, 3, 4, 6)
    torch.testing.assert_close(grid.flatten(1, 2), moe(x, text), rtol=0, atol=1e-13)


@pytest.mark.parametrize("routing", ["dense", "sparse", "uniform", "random"])
def test_bfloat16_stays_finite_and_weights_are_float32(routing):
    moe = ContextualMoE(feed_forward(16, 32, torch.bfloat16), embed_dim=16, text_dim=8, routing=routing)
    x = (torch.randn(3, 7, 16) * 30).to(torch.bfloat16).requires_grad_()
    text = torch.randn(3, 8) * 30
    routing_, context = moe.route(x, text)
    assert routing_.weights_BE.dtype == torch.float32
    torch.testing.assert_close(routing_.weights_BE.sum(-1), torch.ones(3), rtol=0, atol=1e-6)
    assert context is None or context.dtype == torch.bfloat16
    output = moe(x, text)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    gradients_ = [p.grad for p in [*moe.parameters(), x] if p.grad is not None]
    assert len(gradients_) > 4
    assert all(g.isfinite().all() for g in [output, *gradients_])


def test_parameters_of_a_clip_l_block_are_those_that_the_paper_counts():
    ffn = nn.Sequential(nn.Linear(1024, 4096, device="meta"), nn.GELU(), nn.Linear(4096, 1024, device="meta"))
    moe = ContextualMoE(ffn, embed_dim=1024, text_dim=768, num_experts=4)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert all(parameter.is_meta for parameter in moe.parameters())
    assert count(moe.experts) == 33_574_912
    assert count(moe.context.image) == 4_199_424
    assert count(moe.context.text) == 2_363_136
    assert count(moe.context.attention) == 3_935_232 - 590_592
    assert count(moe.router) == 3_076
    assert count(moe) == 43_485_188


def test_training_mode_is_that_of_the_ffn():
    ffn = feed_forward(6, 9).eval()
    moe = ContextualMoE(ffn, embed_dim=6, text_dim=8)
    assert not any(module.training for module in moe.modules())
    assert all(m.training for m in ContextualMoE(ffn.train(), embed_dim=6, text_dim=8).modules())
