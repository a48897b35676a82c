"""FFNs of every form that covft knows, random experts of them, and their mixture written out."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

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
