"""Starts that keep experts apart: what changes, by how much, and that nothing but the seed decides it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import covft
from covft.errors import ConfigError, UnsupportedViTError
from covft.nn import ContextualMoE
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME, TEXT_DIM, features

WIDTH, INNER = 24, 96


class Gated(nn.Module):
    """A gated FFN: two first layers, or one of twice the width."""

    def __init__(self, halves):
        super().__init__()
        self.halves = halves
        self.gate = nn.Linear(WIDTH, 2 * INNER if halves else INNER)
        self.value = None if halves else nn.Linear(WIDTH, INNER)
        self.act, self.down = nn.SiLU(), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        gate, value = self.gate(x).chunk(2, dim=-1) if self.halves else (self.gate(x), self.value(x))
        return self.down(self.act(gate) * value)


def plain():
    return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))


FFNS = {"plain": plain, "gated": lambda: Gated(False), "halves": lambda: Gated(True)}


def moe_of(ffn, kind, *, layer=0, **settings):
    return ContextualMoE(ffn, embed_dim=WIDTH, text_dim=8, expert_init=kind, eval_seed=layer, **settings)


def experts_of(*args, **settings):
    return moe_of(*args, **settings).experts


def state(experts):
    return torch.cat([parameter.detach().flatten() for parameter in experts.parameters()])


@pytest.mark.parametrize("name", FFNS)
def test_noise__is_on_every_matrix_and_has_the_size_that_was_asked_for(name):
    ffn = FFNS[name]()
    experts = experts_of(ffn, "noise", expert_init_scale=0.3)
    before = dict(ffn.named_parameters())
    for expert in experts:
        for key, parameter in expert.named_parameters():
            added = (parameter - before[key]).detach()
            if key.endswith("bias"):
                assert not added.any()
                continue
            # The standard error of a standard deviation of n draws is 1 / sqrt(2 n) of it: five of these.
            spread, error = added.std() / before[key].std(), 5 * (2 * added.numel()) ** -0.5
            assert abs(spread / 0.3 - 1) < error
            assert abs(added.mean()) < 5 * added.std() * added.numel() ** -0.5
    added = torch.stack([expert.get_parameter(key) - before[key] for expert in experts for key in before
                         if key.endswith("weight") and before[key].shape == (WIDTH, INNER)]).flatten(1)  # fmt: skip
    assert added.corrcoef().fill_diagonal_(0).abs().max() < 5 * added.shape[1] ** -0.5


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
@pytest.mark.parametrize("name", FFNS)
def test_drop__redraws_units_in_all_matrices_and_leaves_the_others_alone(name, share):
    ffn = FFNS[name]()
    experts = experts_of(ffn, "drop", expert_init_scale=share)
    chosen = []
    for expert in experts:
        plan = experts.plan
        *first, last = zip(plan.layers(ffn), plan.layers(expert), strict=True)
        units = (last[0].weight != last[1].weight).any(0)
        assert units.sum() == round(share * INNER)
        assert (last[0].weight != last[1].weight)[:, units].all()
        assert torch.equal(last[0].bias, last[1].bias)
        for before, after in first:
            rows = units.repeat(len(before.weight) // INNER)
            assert torch.equal((before.weight != after.weight).all(1), rows)
            assert torch.equal((before.weight != after.weight).any(1), rows)
            assert torch.equal(before.bias != after.bias, rows)
            old, new = before.weight[rows].detach(), after.weight[rows].detach()
            assert abs(new.std() / old.std() - 1) < 5 * (2 * new.numel()) ** -0.5
            assert abs(new.mean() - old.mean()) < 5 * old.std() * new.numel() ** -0.5
        chosen.append(units)
    assert share == 1 or len({tuple(units.tolist()) for units in chosen}) == len(chosen)


@pytest.mark.parametrize("settings", [{"expert_init_seed": 1}, {"layer": 1}], ids=str)
@pytest.mark.parametrize("kind", ["noise", "drop"])
def test_start__is_decided_by_seed_block_and_expert_alone(kind, settings):
    ffn = plain()
    torch.manual_seed(1)
    state_of_generator, first = torch.get_rng_state(), experts_of(ffn, kind, routing="uniform")
    assert torch.equal(torch.get_rng_state(), state_of_generator)  # a copy of the FFN draws nothing
    torch.manual_seed(2)
    with torch.device("meta"):  # as the default device of a caller
        again = experts_of(ffn, kind, num_experts=6)
    assert torch.equal(state(first), state(again[:4]))
    assert not torch.equal(state(first), state(experts_of(ffn, kind, **settings)))
    # In another type, the same draws are rounded.
    wide = experts_of(copy.deepcopy(ffn).double(), kind)
    assert torch.equal(state(first), state(wide).float())


def test_start__of_experts_of_low_rank():
    ffn = plain()
    experts = experts_of(ffn, "noise", expert_rank=8, expert_init_scale=0.3)
    torch.manual_seed(3)
    assert torch.equal(state(experts), state(experts_of(ffn, "noise", expert_rank=8, expert_init_scale=0.3)))
    for layer, difference in zip((ffn[0], ffn[2]), experts.differences, strict=True):
        products = difference.up @ difference.down
        # Entries of a product of rank 8 are not independent, so this is a wider bound.
        assert abs(products.std() / layer.weight.std() / 0.3 - 1) < 0.2
        assert products.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.2
        assert not difference.bias.any()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("upcycled", {}), ("noise", {}), ("drop", {}), ("upcycled", {"expert_rank": 4}), ("noise", {"expert_rank": 4})],
)
def test_start__the_router_has_a_gradient_at_once_only_where_experts_differ(kind, settings):
    moe = moe_of(plain().double(), kind, **settings)
    x, text = torch.randn(3, 5, WIDTH, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    moe(x, text).square().sum().backward()
    largest = moe.router.gate.weight.grad.abs().max()
    assert largest < 1e-12 if kind == "upcycled" else largest > 1e-6


@pytest.mark.parametrize("kind", ["noise", "drop"])
@torch.no_grad()
def test_wrap__starts_elsewhere_saves_loads_and_unwraps(kind, tmp_path):
    tower = BY_NAME["hf-dinov2-swiglu"]
    vit, images, text = tower.build().eval(), tower.images(2), torch.randn(2, TEXT_DIM)
    base, start = copy.deepcopy(vit), features(vit(images))
    encoder = covft.wrap(vit, TEXT_DIM, expert_init=kind, expert_init_seed=3)
    torch.manual_seed(5)
    twin = covft.wrap(copy.deepcopy(base), TEXT_DIM, expert_init=kind, expert_init_seed=3)
    for layer, slot in encoder.slots().items():
        assert torch.equal(state(slot.experts), state(twin.slots()[layer].experts))
    found = features(encoder(images, text))
    assert not torch.allclose(found, start)
    encoder.save_pretrained(tmp_path)
    loaded = covft.load(tmp_path, copy.deepcopy(base), TEXT_DIM)
    assert loaded.covft_config.expert_init == kind
    assert torch.equal(features(loaded(images, text)), found)
    encoder.strength = 0
    assert torch.equal(features(encoder(images, text)), start)
    assert torch.equal(features(covft.unwrap(encoder)(images)), start)


def test_wrap__on_the_meta_device_has_nothing_to_change():
    with torch.device("meta"):
        encoder = covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM, expert_init="drop")
    assert all(parameter.is_meta for parameter in encoder.parameters())


@torch.no_grad()
def test_compress__of_experts_with_units_drawn_anew():
    tower = BY_NAME["timm-clip"]
    encoder = covft.wrap(tower.build().eval(), TEXT_DIM, expert_init="drop")
    images, text = tower.images(2), torch.randn(2, TEXT_DIM)
    before = encoder(images, text)
    covft.compress(encoder, 32)  # of full rank
    torch.testing.assert_close(encoder(images, text), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_init": "drop", "expert_rank": 4}, "experts of low rank share all units"),
        ({"expert_init": "drop", "expert_init_scale": 1.5}, "is not a share"),
        ({"expert_init": "noise", "expert_init_scale": -1}, "expert_init_scale=-1 cannot be used"),
        ({"expert_init": "noise", "expert_init_seed": -1}, "expert_init_seed=-1 cannot be used"),
        ({"expert_init": "random"}, "expert_init='random' is not known"),
    ],
)
def test_refused__settings(settings, message):
    vit = BY_NAME["timm-clip"].build()
    before = snapshot(vit)
    with pytest.raises(ConfigError, match=message):
        covft.wrap(vit, TEXT_DIM, **settings)
    assert_unchanged(vit, before)


def test_refused__units_of_an_ffn_of_another_form():
    import timm

    vit = timm.create_model("swinv2_cr_tiny_224", img_size=64, window_size=2, pretrained=False)
    vit.stages[2].blocks[1].mlp.norm = nn.LayerNorm(4 * 384)
    vit.stages[2].blocks[1].mlp.act = nn.Sequential(nn.GELU(), nn.LayerNorm(4 * 384))
    before = snapshot(vit)
    with pytest.raises(UnsupportedViTError, match=r"cannot tell the units of Mlp: .*weights outside") as raised:
        covft.wrap(vit, TEXT_DIM, expert_init="drop", layers=[5])
    assert "expert_init='noise'" in str(raised.value)
    assert_unchanged(vit, before)
