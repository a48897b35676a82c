"""The mixture that keeps little for backward: the same numbers as experts run one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from covft.nn import fused
from covft.nn.fused import mix
from covft.nn.plan import FFNPlan

D, HIDDEN, E = 6, 10, 3


class Gated(nn.Module):
    """down(act(gate(x)) * up(x)), or with the activation on the other side."""

    def __init__(self, bias=True, last=False, act=None):
        super().__init__()
        self.up, self.gate = nn.Linear(D, HIDDEN, bias=bias), nn.Linear(D, HIDDEN, bias=bias)
        self.down, self.act, self.last = nn.Linear(HIDDEN, D, bias=bias), act or nn.SiLU(), last

    def forward(self, x):
        p, q = self.up(x), self.gate(x)
        return self.down(p * self.act(q) if self.last else self.act(p) * q)


class Halves(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.w12, self.w3, self.last = nn.Linear(D, 2 * HIDDEN), nn.Linear(HIDDEN, D), last

    def forward(self, x):
        p, q = self.w12(x).chunk(2, dim=-1)
        return self.w3(p * F.silu(q) if self.last else F.silu(p) * q)


class WithFunction(nn.Module):
    """The activation is a function, as in a few models of transformers."""

    def __init__(self):
        super().__init__()
        self.dense_in, self.dense_out, self.fn = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D), F.relu

    def forward(self, x):
        return self.dense_out(self.fn(self.dense_in(x)))


class HalvesWithModule(Halves):
    def __init__(self, last):
        super().__init__(last)
        self.act = nn.GELU()

    def forward(self, x):
        p, q = self.w12(x).chunk(2, dim=-1)
        return self.w3(p * self.act(q) if self.last else self.act(p) * q)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


FFNS = {
    "mlp": lambda: nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D)),
    "mlp of equal widths": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)),
    "mlp without biases": lambda: nn.Sequential(
        nn.Linear(D, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, D, bias=False)
    ),
    "one bias": lambda: nn.Sequential(nn.Linear(D, HIDDEN), QuickGELU(), nn.Linear(HIDDEN, D, bias=False)),
    "with identities": lambda: nn.Sequential(
        nn.Linear(D, HIDDEN), nn.GELU(approximate="tanh"), nn.Dropout(0.0), nn.Identity(), nn.Linear(HIDDEN, D)
    ),
    "function": WithFunction,
    "gate first": Gated,
    "gate last": lambda: Gated(last=True),
    "gate without biases": lambda: Gated(bias=False),
    "halves first": lambda: HalvesWithModule(False),
    "halves last": lambda: HalvesWithModule(True),
}


def experts_like(ffn, dtype=torch.float64):
    experts = [copy.deepcopy(ffn).to(dtype) for _ in range(E)]
    for expert in experts:
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.5)
    return experts


def one_by_one(x, weights, experts):
    outputs = torch.stack([expert(x) for expert in experts], dim=1)
    return (outputs * weights.view(*weights.shape, *[1] * (x.dim() - 1))).sum(1)


@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, D), (3, D), (2, 2, 3, D)], ids=str)
@pytest.mark.parametrize("name", FFNS)
def test_mix__values_and_all_gradients_are_those_of_the_experts(name, shape, keep, rows, monkeypatch):
    monkeypatch.setattr(fused, "_ROWS", rows)  # worked on in blocks, the last one smaller, or at once
    ffn = FFNS[name]()
    plan, reason = FFNPlan.of(ffn)
    assert plan is not None, reason
    experts = experts_like(ffn)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(shape[0], E, dtype=torch.float64, requires_grad=True)
    inputs = [x, weights, *(p for expert in experts for p in expert.parameters())]
    wanted = one_by_one(x, weights, experts)
    found = mix(x, weights, experts, plan, keep_pre_activations=keep)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(wanted, inputs, upstream), torch.autograd.grad(found, inputs, upstream), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_mix__agrees_with_finite_differences(keep):
    ffn = Gated()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)[:2]
    parameters = [p for expert in experts for p in expert.parameters()]
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weights, *_):
        return mix(x, weights, experts, plan, keep_pre_activations=keep)

    assert torch.autograd.gradcheck(function, (x, weights, *parameters))


@pytest.mark.parametrize("frozen", ["x", "weights", "experts", "one expert", "biases"])
def test_mix__what_is_frozen_gets_no_gradient(frozen, monkeypatch):
    monkeypatch.setattr(fused, "_ROWS", 3)
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=frozen != "x")
    weights = torch.rand(2, E, dtype=torch.float64, requires_grad=frozen != "weights")
    named = {f"{e}.{name}": p for e, expert in enumerate(experts) for name, p in expert.named_parameters()}
    for name, parameter in named.items():
        off = {"experts": True, "one expert": name.startswith("1."), "biases": name.endswith("bias")}
        parameter.requires_grad_(not off.get(frozen, False))
    one_by_one(x, weights, experts).square().sum().backward()
    wanted = {name: p.grad for name, p in {**named, "x": x, "weights": weights}.items()}
    for tensor in (x, weights, *named.values()):
        tensor.grad = None
    mix(x, weights, experts, plan, keep_pre_activations=True).square().sum().backward()
    for name, tensor in {**named, "x": x, "weights": weights}.items():
        assert (tensor.grad is None) == (wanted[name] is None), name
        assert tensor.grad is None or torch.allclose(tensor.grad, wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_mix__without_any_image(keep):
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x = torch.zeros(0, 4, D, dtype=torch.float64, requires_grad=True)
    output = mix(x, torch.zeros(0, E, dtype=torch.float64), experts, plan, keep_pre_activations=keep)
    assert output.shape == (0, 4, D)
    output.sum().backward()
    for expert in experts:
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in expert.parameters())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["mlp", "gate first", "one bias"])
def test_mix__under_autocast_computes_in_its_type(name, keep, monkeypatch):
    monkeypatch.setattr(fused, "_ROWS", 4)
    ffn = FFNS[name]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn, torch.float32)
    x = torch.randn(2, 5, D, requires_grad=True)
    weights = torch.rand(2, E, requires_grad=True)
    inputs = [x, weights, *(p for expert in experts for p in expert.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = one_by_one(x, weights, experts)
        found = mix(x, weights, experts, plan, keep_pre_activations=keep)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2 * wanted.abs().max().item())
    exact = torch.autograd.grad(one_by_one(x, weights, experts).sum(), inputs)
    rounded = torch.autograd.grad(wanted.sum(), inputs)
    ours = torch.autograd.grad(found.sum(), inputs)
    for one, other, tensor, plain in zip(ours, exact, inputs, rounded, strict=True):
        assert one.dtype == tensor.dtype
        scale = other.abs().max().item() + 1e-6
        # No further from the exact gradient than autocast itself is, within a few roundings.
        assert (one - other).abs().max() <= (plain - other).abs().max() + 0.03 * scale


def test_mix__keeps_the_tokens_and_what_it_says():
    ffn = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    plan, _ = FFNPlan.of(ffn)
    experts = [copy.deepcopy(ffn) for _ in range(E)]
    own = {p.untyped_storage().data_ptr() for expert in experts for p in expert.parameters()}
    x, weights = torch.randn(2, 50, 32, requires_grad=True), torch.rand(2, E, requires_grad=True)

    def kept(function):
        seen = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = function()
        del output
        return sum(seen.values())

    tokens, routing = x.numel() * 4, weights.numel() * 4
    assert kept(lambda: mix(x, weights, experts, plan, keep_pre_activations=False)) == tokens + routing
    wide = tokens + routing + E * 2 * 50 * 128 * 4
    assert kept(lambda: mix(x, weights, experts, plan, keep_pre_activations=True)) == wide
    assert kept(lambda: one_by_one(x, weights, experts)) > 1.8 * wide


@pytest.mark.parametrize("name", ["mlp", "gate last"])
def test_mix__can_be_differentiated_twice(name):
    ffn = FFNS[name]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)[:2]
    parameters = [p for expert in experts for p in expert.parameters()]
    x = torch.randn(2, 2, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weights, *_):
        return mix(x, weights, experts, plan, keep_pre_activations=True)

    assert torch.autograd.gradgradcheck(function, (x, weights, *parameters))
    # A gradient penalty: the upstream gradient has no graph of its own.
    grown = []
    for run in (lambda: function(x, weights), lambda: one_by_one(x, weights, experts)):
        (gradient,) = torch.autograd.grad(run().sum(), x, create_graph=True)
        grown.append(torch.autograd.grad(gradient.square().sum(), [x, weights, *parameters], allow_unused=True))
    for one, other in zip(*grown, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        output = mix(x.detach().float().requires_grad_(), weights.detach().float(),
                     experts_like(ffn, torch.float32)[:2], plan, keep_pre_activations=True)  # fmt: skip
    with pytest.raises(NotImplementedError, match="recompute='none'"):
        output.sum().backward(create_graph=True)


def test_mix__weights_that_changed_since_are_noticed():
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    output = mix(x, torch.rand(2, E, dtype=torch.float64), experts, plan, keep_pre_activations=True)
    with torch.no_grad():
        experts[0][0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_mix__keeps_nothing_where_nothing_is_differentiated():
    ffn = FFNS["mlp"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    x, weights = torch.randn(2, 5, D, dtype=torch.float64), torch.rand(2, E, dtype=torch.float64)
    wanted = mix(x, weights, experts, plan, keep_pre_activations=True)
    with torch.no_grad():
        found = mix(x, weights, experts, plan, keep_pre_activations=True)
    assert torch.equal(found, wanted)
    assert not found.requires_grad


# Plans.


class OwnQuickGELU(nn.Module):
    """Of another library, and not quite written like ours."""

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


def test_plan__an_activation_that_was_put_in_later_counts():
    ffn = FFNS["one bias"]()
    plan, _ = FFNPlan.of(ffn)
    experts = experts_like(ffn)
    for expert in experts:
        expert[1] = nn.GELU()
    x, weights = torch.randn(2, 3, D, dtype=torch.float64), torch.rand(2, E, dtype=torch.float64)
    found = mix(x, weights, experts, plan, keep_pre_activations=False)
    assert torch.allclose(found, one_by_one(x, weights, experts), rtol=1e-12, atol=1e-12)


def test_plan__takes_no_part_of_the_random_numbers_and_changes_nothing():
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
    assert plan == FFNPlan(("w12",), "w3", "act", "gate_last_halves")


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


@pytest.mark.parametrize(
    ("ffn", "reason"),
    [
        (Scaled(), "another form"),
        (Residual(), "another form"),
        (Halves(last=True), "another form"),  # its activation is nowhere to be found
        (NeedsMore(), "tokens alone"),
        (nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, D)), "dropout"),
        (nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, D)), "weights besides"),
        (nn.Sequential(nn.Linear(D, HIDDEN), nn.PReLU(), nn.Linear(HIDDEN, D)), "weights besides"),
        (nn.Sequential(nn.Conv2d(D, HIDDEN, 1), nn.GELU(), nn.Conv2d(HIDDEN, D, 1)), "another form"),
        (nn.Sequential(nn.Linear(D, HIDDEN, device="meta"), nn.GELU(), nn.Linear(HIDDEN, D, device="meta")), "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plan__what_it_cannot_take_apart_it_names(ffn, reason):
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
    other[0] = type("Adapter", (nn.Linear,), {})(D, HIDDEN)  # as peft and quantisation put there
    assert not plan.applies_to(other)
    sharded = copy.deepcopy(ffn)
    sharded[0].weight.ds_id = 1
    assert not plan.applies_to(sharded)


def _with_norm(ffn):
    twin = copy.deepcopy(ffn)
    nn.utils.parametrizations.weight_norm(twin[0])
    return twin
