"""The bytes per GPU of the guide to many GPUs: its arithmetic, what processes really hold, and the page."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.memory.__main__ import PAGE, SECTION, section
from benchmarks.memory.activations import kept
from benchmarks.memory.models import Model
from benchmarks.memory.states import STRATEGIES, Counts, states
from tests.distributed import processes


def test_states__are_16_bytes_per_trained_parameter_on_one_gpu():
    """The sum that the ZeRO paper gives for mixed precision with Adam; a frozen one is 2 bytes."""
    for strategy in STRATEGIES:
        found = states(Counts(trained=1000, frozen=10, block=100, root=10), strategy, 1)
        assert found.weights + found.gradients + found.copies + found.optimizer == 16_020
        assert found.total > 16_020


def test_states__on_eight_gpus_are_those_of_the_zero_paper():
    """Figure 1 of arXiv 1910.02054, 7.5 B parameters on 64 GPUs: 120 GB, 16.6 GB (gradients and optimizer), 1.9 GB."""
    counts = Counts(trained=7_500_000_000, frozen=0)
    found = {name: states(counts, name, 64) for name in STRATEGIES}
    sums = {name: s.weights + s.gradients + s.copies + s.optimizer for name, s in found.items()}
    assert sums["DDP"] / 1e9 == pytest.approx(120)
    assert sums["ZeRO-2"] / 1e9 == pytest.approx(16.6, abs=0.05)
    assert sums["ZeRO-3"] / 1e9 == sums["FSDP2"] / 1e9 == pytest.approx(1.9, abs=0.05)


def test_kept__counts_what_autograd_keeps_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        x = torch.empty(5, 8, requires_grad=True)
    assert kept(lambda: model(x), model) == 4 * 5 * (8 + 32 + 32)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_states__are_what_two_processes_hold(scenario, tmp_path):
    """All in float32: what is frozen takes 4 bytes here."""
    processes.run(scenario, tmp_path, worker="tests.distributed.bytes_worker")
    found = [json.loads((tmp_path / f"bytes-{rank}.json").read_text()) for rank in range(2)]
    wanted = states(Counts(found[0]["trained"], 2 * found[0]["frozen"]), {"ddp": "DDP", "fsdp2": "FSDP2"}[scenario], 2)
    for part in ("weights", "gradients", "optimizer"):
        if scenario == "ddp":
            assert [rank[part] for rank in found] == [getattr(wanted, part)] * 2
        else:  # a shard of an odd number of rows is larger on the first process
            assert sum(rank[part] for rank in found) == 2 * getattr(wanted, part)
            assert found[0][part] == pytest.approx(getattr(wanted, part), rel=0.05)


@pytest.mark.slow
def test_models__have_the_known_numbers_of_parameters():
    model = Model("LLaVA-7B", lora=False)
    assert sum(p.numel() for p in model.plain.parameters()) == 7_063_427_072
    # Twelve blocks of 43,485,188 instead of the FFN's 8,393,728 parameters, as in docs/faq.md.
    assert model.counts.trained + model.counts.frozen == 7_063_427_072 + 12 * (43_485_188 - 8_393_728)


@pytest.mark.slow
def test_page__is_what_the_command_writes():
    (found,) = SECTION.findall(PAGE.read_text())
    assert found == section()
