"""Which experts an image uses: the four routers."""

import pytest
import torch

from covft.nn import DenseRouter, RandomRouter, SparseRouter, UniformRouter

CPU = torch.device("cpu")
W, E = 6, 5


def vectors(batch=7, dtype=torch.float64):
    return torch.randn(batch, W, dtype=dtype)


def test_dense_weights_are_the_softmax_of_the_gate():
    router, context = DenseRouter(W, E, dtype=torch.float64), vectors()
    routing = router(context, 7, device=CPU)
    for row, vector in zip(routing.weights_BE, context, strict=True):
        exponentials = torch.exp(router.gate.weight @ vector + router.gate.bias)
        torch.testing.assert_close(row, exponentials / exponentials.sum(), rtol=1e-12, atol=1e-12)
    assert routing.expert_ids_BK is None
    torch.testing.assert_close(routing.logits_BE.log_softmax(-1), routing.weights_BE.log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_sparse_weights_keep_the_best_and_sum_to_one(top_k):
    router, context = SparseRouter(W, E, top_k, dtype=torch.float64), vectors()
    weights, ids, logits = (part.detach() for part in router(context, 7, device=CPU))
    torch.testing.assert_close(weights.sum(-1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-14)
    for b in range(7):
        chosen = sorted(range(E), key=lambda e: -float(logits[b, e]))[:top_k]
        assert set(ids[b].tolist()) == set(chosen)
        softmax = logits[b].exp() / logits[b].exp().sum()
        for e in range(E):
            wanted = softmax[e] / sum(softmax[c] for c in chosen) if e in chosen else 0.0
            assert float(weights[b, e]) == pytest.approx(float(wanted), abs=1e-13)
            assert (weights[b, e] != 0) == (e in chosen)


def test_with_all_experts_chosen_sparse_is_dense():
    sparse, dense = SparseRouter(W, E, E, dtype=torch.float64), DenseRouter(W, E, dtype=torch.float64)
    dense.load_state_dict(sparse.state_dict())
    context = vectors()
    torch.testing.assert_close(
        sparse(context, 7, device=CPU).weights_BE,
        dense(context, 7, device=CPU).weights_BE,
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize("router", [DenseRouter(W, E), SparseRouter(W, E, 2)])
def test_the_gate_starts_random_so_that_texts_are_told_apart(router):
    """At zero every text would have the same weights, and the experts could never come apart."""
    assert router.gate.weight.std() > 0.05
    assert router.gate.weight.unique().numel() == W * E
    routing = router(vectors(dtype=torch.float32), 7, device=CPU)
    assert routing.logits_BE.std(0).min() > 1e-3
    assert routing.weights_BE.unique(dim=0).shape[0] == 7


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7])
def test_uniform_weights_are_equal_and_have_no_parameters(num_experts):
    router = UniformRouter(num_experts)
    routing = router(None, 4, device=CPU)
    torch.testing.assert_close(routing.weights_BE, torch.full((4, num_experts), 1 / num_experts))
    assert (routing.expert_ids_BK, routing.logits_BE) == (None, None)
    assert not list(router.parameters())


def test_weights_that_follow_from_no_context_are_exact_in_float64():
    for router in (UniformRouter(3), RandomRouter(E, 3)):
        weights = router(None, 4, device=CPU, dtype=torch.float64).weights_BE
        assert weights.dtype == torch.float64
        assert (weights[weights > 0] == 1 / 3).all()
        assert router(None, 4, device=CPU).weights_BE.dtype == torch.float32


def draws(router, seed=None, batch=200):
    return router(None, batch, device=CPU, seed=seed)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_random_experts_are_distinct_per_image_and_weigh_the_same(top_k):
    routing = draws(RandomRouter(E, top_k))
    assert all(len(set(row)) == top_k for row in routing.expert_ids_BK.tolist())
    wanted = torch.zeros(200, E)
    for b, row in enumerate(routing.expert_ids_BK.tolist()):
        wanted[b, row] = 1 / top_k
    torch.testing.assert_close(routing.weights_BE, wanted)
    assert routing.logits_BE is None


def test_random_experts_differ_between_images_and_reach_every_expert():
    counts = draws(RandomRouter(E, 2), batch=500).expert_ids_BK.flatten().bincount(minlength=E)
    assert counts.sum() == 1000
    assert counts.min() > 100  # 200 expected, 13 the standard deviation


def test_random_draws_are_fresh_in_training_and_the_same_for_the_same_seed():
    router = RandomRouter(E, 2)
    assert not torch.equal(draws(router).expert_ids_BK, draws(router).expert_ids_BK)
    assert not torch.equal(draws(router, 1).expert_ids_BK, draws(router, 2).expert_ids_BK)
    assert torch.equal(draws(router, 1).expert_ids_BK, draws(router, 1).expert_ids_BK)
    other_block = RandomRouter(E, 2, eval_seed=3)
    assert not torch.equal(draws(router, 1).expert_ids_BK, draws(other_block, 1).expert_ids_BK)


def test_random_draws_are_fixed_in_eval():
    router = RandomRouter(E, 2, eval_seed=11).eval()
    first = draws(router)
    torch.manual_seed(99)
    assert torch.equal(first.expert_ids_BK, draws(router, seed=5).expert_ids_BK)
    assert not torch.equal(first.expert_ids_BK, draws(RandomRouter(E, 2, eval_seed=12).eval()).expert_ids_BK)


def test_a_seeded_draw_leaves_the_global_generator_alone():
    router, state = RandomRouter(E, 2), torch.get_rng_state()
    draws(router, seed=5)
    draws(router.eval())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [DenseRouter, lambda w, e, dtype: SparseRouter(w, e, 2, dtype=dtype)])
def test_weights_of_a_bfloat16_router_are_float32(make):
    router = make(W, E, dtype=torch.bfloat16)
    weights = router(vectors(dtype=torch.bfloat16) * 50, 7, device=CPU).weights_BE
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(7), rtol=0, atol=1e-6)


def test_a_fixed_router_stands_in_for_any_other():
    from covft.nn import ContextualMoE
    from covft.testing import FixedRouter

    ffn = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)).double()
    moe = ContextualMoE(ffn, embed_dim=4, text_dim=None, num_experts=2, routing="uniform")
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter))
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    moe.router = FixedRouter(weights)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    one, two = (expert(x) for expert in moe.experts)
    expected = torch.stack([0.25 * one[0] + 0.75 * two[0], one[1]])
    assert torch.allclose(moe(x), expected, rtol=0, atol=1e-12)
