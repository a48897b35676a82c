"""Plans of FFNs: found by their form, checked by their values, and refused with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from covft.nn.fused import mix
from covft.nn.plan import FFNPlan
from tests.helpers.ffns import FFNS, HIDDEN, D, E, Halves, HalvesWithModule, QuickGELU, experts_like, one_by_one


class OwnQuickGELU(nn.Module):
    """QuickGELU of another library, written differently."""

    def forward(self, x):
        return torch.sigmoid(x * 1.702).mul(x)


@pytest.mark.parametrize(
    ("act", "scale"),
    [(QuickGELU(), 1.702), (OwnQuickGELU(), 1.702), (nn.GELU(), 1), (nn.GELU(approximate="tanh"), 1), (nn.SiLU(), 1)],
    ids=["quick", "quick of another library", "gelu", "tanh", "silu"],
)
def test_plan__knows_quick_gelu_by_its_values(act, scale):
    ffn = nn.Sequential(nn.Linear(D, HIDDEN), act, nn.Linear(HIDDEN, D))
    plan, _ = FFNPlan.of(ffn)
    between = plan.between(ffn)
    assert between.scale == scale
    x = torch.randn(50, dtype=torch.float64)
    assert torch.allclose(between(x), act(x), rtol=1e-12)
    assert torch.allclose(between.scaled(scale * x) / scale, act(x), rtol=1e-12, atol=1e-14)


def test_plan__uses_an_activation_that_was_replaced_later():
    ffn = FFNS["one bias"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    for expert in experts:
        expert[1] = nn.GELU()
    x, weights = torch.randn(2, 3, D, dtype=torch.float64), torch.rand(2, E, dtype=torch.float64)
    found = mix(x, weights, experts, plan, keep_pre_activations=False)
    assert torch.allclose(found, one_by_one(x, weights, experts), rtol=1e-12, atol=1e-12)


def test_plan__draws_no_global_random_numbers_and_changes_nothing():
    ffn = FFNS["mlp"]()
    before = {name: p.clone() for name, p in ffn.named_parameters()}
    state = torch.get_rng_state()
    FFNPlan.of(ffn)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in ffn.named_parameters())


def test_plan__is_found_by_form_and_not_by_values():
    ffn = HalvesWithModule(last=True)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.zero_()
    plan, _ = FFNPlan.of(ffn)
    assert plan == FFNPlan(("w12",), "w3", "act", "gate_last_halves", (((nn.GELU, "approximate='none'"), "gelu"),))
    assert plan.between(ffn).function == "gelu"
    ffn.act = nn.GELU(approximate="tanh")
    assert plan.between(ffn).function is None


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D)

    def forward(self, x):
        return 2 * self.fc2(self.act(self.fc1(x)))


class Residual(Scaled):
    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class NeedsMore(Scaled):
    def forward(self, x, height):
        return self.fc2(self.act(self.fc1(x)))


class Called(nn.Module):
    """An FFN whose forward calls functions."""

    def __init__(self, function=nn.functional.gelu, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.__dict__["settings"] = function, dropout

    def forward(self, x):
        function, dropout = self.__dict__["settings"]
        return self.fc2(nn.functional.dropout(function(self.fc1(x)), dropout, self.training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("ffn", "plan"),
    [
        (Called(), FFNPlan(("fc1",), "fc2", "()gelu", "plain")),
        (Called(nn.functional.silu), FFNPlan(("fc1",), "fc2", "()silu", "plain")),
        (Called(lambda x: x * torch.sigmoid(1.702 * x)), FFNPlan(("fc1",), "fc2", "()quick_gelu", "plain")),
        (Halves(last=True), FFNPlan(("w12",), "w3", "()silu", "gate_last_halves")),
    ],
    ids=["gelu", "silu", "quick", "gated halves"],
)
def test_plan__knows_activations_that_are_called_as_functions(ffn, plan, training):
    found, why = FFNPlan.of(ffn.train(training))
    assert (found, why) == (plan, "")
    assert found.between(ffn).function == plan.activation[2:]
    experts = experts_like(ffn)
    x, weights = torch.randn(2, 3, D, dtype=torch.float64), torch.rand(2, E, dtype=torch.float64)
    mixed = mix(x, weights, experts, found, keep_pre_activations=False)
    assert torch.allclose(mixed, one_by_one(x, weights, experts), rtol=1e-12, atol=1e-12)


class Buffered(nn.Sequential):
    """Something whose values nobody knows may count."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D, HIDDEN, device="meta"), nn.GELU(), nn.Linear(HIDDEN, D, device="meta"))
        self.register_buffer("scale", torch.ones(D, device="meta"))


def test_plan__is_found_without_weights():
    for name, make in FFNS.items():
        wanted, _ = FFNPlan.of(make())
        if next(make().buffers(), None) is None:
            assert FFNPlan.of(make().to("meta")) == (wanted, ""), name


@pytest.mark.parametrize(
    ("ffn", "reason"),
    [
        (Scaled(), "another form"),
        (Residual(), "another form"),
        (Called(dropout=0.1), "another form"),
        (NeedsMore(), "tokens alone"),
        (nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, D)), "dropout"),
        (nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, D)), "weights outside"),
        (nn.Sequential(nn.Linear(D, HIDDEN), nn.PReLU(), nn.Linear(HIDDEN, D)), "weights outside"),
        (nn.Sequential(nn.Conv2d(D, HIDDEN, 1), nn.GELU(), nn.Conv2d(HIDDEN, D, 1)), "another form"),
        (Buffered(), "buffers are on the meta device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plan__refuses_other_forms_with_a_reason(ffn, reason):
    plan, why = FFNPlan.of(ffn)
    assert plan is None
    assert reason in why


def test_plan__does_not_apply_where_modules_have_to_run_themselves():
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    assert plan.applies_to(ffn)
    handle = ffn[1].register_forward_hook(lambda *_: None)
    assert not plan.applies_to(ffn)
    handle.remove()
    assert plan.applies_to(ffn)
    assert not plan.applies_to(_with_norm(ffn))
    other = copy.deepcopy(ffn)
    other[0] = type("Adapter", (nn.Linear,), {})(D, HIDDEN)  # as peft and quantisation do
    assert not plan.applies_to(other)
    sharded = copy.deepcopy(ffn)
    sharded[0].weight.ds_id = 1
    assert not plan.applies_to(sharded)


def _with_norm(ffn):
    twin = copy.deepcopy(ffn)
    nn.utils.parametrizations.weight_norm(twin[0])
    return twin
