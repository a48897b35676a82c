"""The auxiliary losses, against their formulas."""

import math

import pytest
import torch

from covft.nn import load_balance_loss, router_z_loss


def test_an_even_spread_costs_one():
    ids = torch.arange(4).repeat(3)[:, None]
    torch.testing.assert_close(load_balance_loss(torch.zeros(12, 4), ids), torch.tensor(1.0))
    pairs = torch.tensor([[0, 1], [2, 3]])
    torch.testing.assert_close(load_balance_loss(torch.zeros(2, 4), pairs), torch.tensor(1.0))


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_all_on_one_expert_costs_as_much_as_there_are_experts(num_experts):
    logits = torch.full((6, num_experts), -1e4)
    logits[:, 1] = 0.0
    ids = torch.ones(6, 1, dtype=torch.long)
    torch.testing.assert_close(load_balance_loss(logits, ids), torch.tensor(float(num_experts)))


def test_load_balance_is_the_formula_with_its_gradient():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, 3], [1, 2], [0, 3], [1, 0]])
    shares = [ids.flatten().tolist().count(e) / ids.numel() for e in range(4)]
    probabilities = [row.exp() / row.exp().sum() for row in logits]
    wanted = 4 * sum(shares[e] * sum(p[e] for p in probabilities) / 5 for e in range(4))
    found = load_balance_loss(logits, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours.abs().max() > 1e-3
    assert torch.autograd.gradcheck(lambda free: load_balance_loss(free, ids), logits)


def test_a_step_down_the_loss_moves_images_to_the_neglected_expert():
    logits = torch.zeros(4, 2, requires_grad=True)
    load_balance_loss(logits, torch.tensor([[0], [0], [0], [1]])).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1] < 0).all()


def test_z_loss_is_the_mean_squared_log_partition():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    wanted = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.tolist()) / 5
    assert router_z_loss(logits.detach()).item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(router_z_loss, logits)
    assert router_z_loss(torch.full((2, 4), -math.log(4))).item() < 1e-12


def test_half_precision_logits_are_summed_in_float32():
    logits = (torch.randn(5, 4) * 40).to(torch.bfloat16)
    ids = logits.topk(2).indices
    for loss in (load_balance_loss(logits, ids), router_z_loss(logits)):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
