"""The experts: copies of an FFN, each run on the images that chose it."""

import pytest
import torch
from torch import nn

from covft.nn import Experts, Routing


class Scaled(nn.Module):
    """An FFN that takes more than the tokens."""

    def __init__(self, width=4):
        super().__init__()
        self.proj = nn.Linear(width, width, dtype=torch.float64)
        self.calls = []

    def forward(self, x, scale, *, shift=0.0):
        self.calls.append((len(x), scale, shift))
        return self.proj(x) * scale + shift


def apart(ffn, num_experts):
    experts = Experts.upcycled(ffn, num_experts)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return experts


def chosen(ids, weights, num_experts):
    dense = torch.zeros(len(ids), num_experts, dtype=torch.float64)
    return Routing(dense.scatter(1, ids, weights), ids)


def test_experts_are_exact_copies_that_share_nothing():
    ffn = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    experts = Experts.upcycled(ffn, 3)
    pointers = {p.data_ptr() for p in ffn.parameters()}
    for expert in experts:
        assert type(expert) is type(ffn)
        assert all(torch.equal(a, b) for a, b in zip(expert.parameters(), ffn.parameters(), strict=True))
        pointers |= {p.data_ptr() for p in expert.parameters()}
    assert len(pointers) == 4 * 4
    with torch.no_grad():
        experts[0][0].weight.zero_()
    assert ffn[0].weight.any()
    assert experts[1][0].weight.any()


def test_experts_of_a_frozen_ffn_are_trainable_and_it_stays_frozen():
    ffn = nn.Linear(4, 4).requires_grad_(False)
    experts = Experts.upcycled(ffn, 2)
    assert all(parameter.requires_grad for parameter in experts.parameters())
    assert not any(parameter.requires_grad for parameter in ffn.parameters())


@pytest.mark.parametrize("sparse", [False, True])
def test_further_arguments_reach_every_expert(sparse):
    experts, x = apart(Scaled(), 3), torch.randn(2, 5, 4, dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    ids = torch.tensor([[0, 1], [1, 0]])
    routing = chosen(ids, weights, 3)
    if not sparse:
        routing = Routing(routing.weights_BE)
    output = experts(x, routing, 3.0, shift=0.5)
    assert [expert.calls[0][1:] for expert in experts] == [(3.0, 0.5)] * 3
    assert [expert.calls[0][0] for expert in experts] == ([2, 2, 0] if sparse else [2, 2, 2])
    for b in range(2):
        wanted = sum(routing.weights_BE[b, e] * (experts[e].proj(x[b]) * 3.0 + 0.5) for e in range(3))
        torch.testing.assert_close(output[b], wanted, rtol=1e-12, atol=1e-12)


def test_an_expert_that_no_image_chose_gets_a_gradient_of_zeros():
    experts = apart(nn.Linear(4, 4, dtype=torch.float64), 3)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    ids = torch.tensor([[2], [0]])
    experts(x, chosen(ids, torch.ones(2, 1, dtype=torch.float64), 3)).square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts[1].parameters())
    assert all(p.grad.any() for e in (0, 2) for p in experts[e].parameters())


def test_sparse_runs_only_the_images_that_chose_an_expert():
    experts = apart(Scaled(), 4)
    ids = torch.tensor([[0, 3], [3, 2], [3, 0]])
    routing = chosen(ids, torch.full((3, 2), 0.5, dtype=torch.float64), 4)
    experts(torch.randn(3, 5, 4, dtype=torch.float64), routing, 1.0)
    assert [expert.calls[0][0] for expert in experts] == [2, 0, 1, 3]


def test_dense_and_sparse_agree_where_all_are_chosen():
    experts, x = apart(nn.Linear(4, 6, dtype=torch.float64), 3), torch.randn(2, 5, 4, dtype=torch.float64)
    weights = torch.randn(2, 3, dtype=torch.float64).softmax(-1)
    ids = torch.arange(3).expand(2, 3)
    torch.testing.assert_close(experts(x, Routing(weights)), experts(x, Routing(weights, ids)), rtol=0, atol=1e-13)


def test_tokens_of_any_layout_keep_their_shape():
    experts = apart(nn.Linear(4, 4, dtype=torch.float64), 2)
    routing = Routing(torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64))
    for shape in [(2, 4), (2, 5, 4), (2, 3, 3, 4)]:
        assert experts(torch.randn(shape, dtype=torch.float64), routing).shape == shape
