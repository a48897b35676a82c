"""Counts and optimizer groups of parameters, ordinary ones and ones that ZeRO-3 partitioned."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import covft
from covft.testing import ToyViT
from covft.utils.parameters import count, param_groups

IDS = itertools.count()


def partition(module):
    """Leave of each parameter what ZeRO-3 leaves: no elements, and the shape in an attribute."""
    for parameter in module.parameters():
        parameter.ds_id, parameter.ds_shape = next(IDS), parameter.shape
        parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = parameter.data.new_empty(0)
    return module


def both(module):
    """A module and its partitioned twin."""
    return module, partition(copy.deepcopy(module))


def model():
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))


def part(name):
    return "first" if name.startswith("0") else "rest"


def grouped(module, **options):
    settings = {"lr": 1e-3, "rates": {}, "weight_decay": 0.1, **options}
    groups = param_groups(module.named_parameters(), part, **settings)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [{**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in groups]


@pytest.mark.parametrize("module", both(model()), ids=["plain", "partitioned"])
def test_count__is_the_full_number(module):
    assert count(module.parameters()) == (3 * 5 + 5) + 2 * 5 + 5 * 2
    assert count([]) == 0


def test_count__of_a_mixture_of_both():
    plain, spread = both(nn.Linear(3, 5))
    assert all(parameter.numel() == 0 for parameter in spread.parameters())
    assert count([*plain.parameters(), *spread.parameters()]) == 2 * 20


@pytest.mark.parametrize("module", both(model()), ids=["plain", "partitioned"])
def test_param_groups__matrices_are_decayed_and_vectors_are_not(module):
    assert grouped(module, rates={"rest": 5e-3, "first": None}) == [
        {"params": ["0.weight"], "lr": 1e-3, "weight_decay": 0.1, "name": "first/decay"},
        {"params": ["0.bias"], "lr": 1e-3, "weight_decay": 0.0, "name": "first/no_decay"},
        {"params": ["1.weight", "1.bias"], "lr": 5e-3, "weight_decay": 0.0, "name": "rest/no_decay"},
        {"params": ["2.weight"], "lr": 5e-3, "weight_decay": 0.1, "name": "rest/decay"},
    ]


@pytest.mark.parametrize("module", both(model()), ids=["plain", "partitioned"])
def test_param_groups__frozen_parameters_and_other_names_are_left_out(module):
    module[0].requires_grad_(False)
    found = grouped(module, decayed=["0.weight"])
    assert found == [{"params": ["1.weight", "1.bias", "2.weight"], "lr": 1e-3, "weight_decay": 0.0,
                      "name": "rest/no_decay"}]  # fmt: skip


@pytest.mark.parametrize("module", both(model()), ids=["plain", "partitioned"])
def test_param_groups__come_in_the_order_that_is_asked_for(module):
    names = [group["name"] for group in grouped(module, order=("rest", "first"))]
    assert names == ["rest/decay", "rest/no_decay", "first/decay", "first/no_decay"]


def test_param_groups__a_rate_of_zero_is_a_rate():
    assert {group["lr"] for group in grouped(model(), rates={"first": 0.0, "rest": 0.0})} == {0.0}


@pytest.fixture
def encoders():
    """A wrapped ToyViT, and the same with every parameter partitioned after wrapping."""
    torch.manual_seed(0)
    return both(covft.wrap(ToyViT(), 8, layers=[1, 2], experts=2))


def test_encoder__groups_of_partitioned_parameters_are_those_of_plain_ones(encoders):
    found = []
    for encoder in encoders:
        names = {id(parameter): name for name, parameter in encoder.vit.named_parameters()}
        groups = encoder.param_groups(lr=1e-4, experts_lr=1e-5, router_lr=1e-3, norms_lr=1e-6, weight_decay=0.05)
        found.append([{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups])
    plain, spread = found
    assert spread == plain
    decayed = {name for group in spread if group["weight_decay"] for name in group["params"]}
    trained = {name: p for name, p in encoders[0].vit.named_parameters() if p.requires_grad}
    assert decayed == {name for name, p in trained.items() if p.dim() > 1}
    assert decayed
    assert sorted(name for group in spread for name in group["params"]) == sorted(trained)
    assert {group["name"] for group in spread if group["weight_decay"]} == {"experts/decay", "router/decay"}


def test_encoder__prints_the_full_numbers_of_partitioned_parameters(encoders, capsys):
    plain, spread = encoders
    assert not any(parameter.numel() for parameter in spread.parameters())
    spread.print_trainable_parameters()
    printed = capsys.readouterr().out
    trained = sum(parameter.numel() for parameter in plain.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in plain.parameters())
    share = f"{100 * trained / total:.4f}"
    assert printed == f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share}\n"
    plain.print_trainable_parameters()
    assert capsys.readouterr().out == printed
