"""The speed benchmark: its two sides compute the same, and its command writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.speed.__main__ import main
from benchmarks.speed.baseline import ObviousMoE
from benchmarks.speed.cases import TINY, Block, Tower, measure_tower
from benchmarks.speed.measure import bytes_for_backward, flops, interleaved, peak_memory


@pytest.mark.parametrize("routing", ["dense", "sparse"])
def test_baseline__has_the_values_and_gradients_of_covft(routing):
    block = Block(TINY, batch=3, experts=4, routing=routing, dtype=torch.float64)
    assert isinstance(block.baseline, ObviousMoE)
    results = []
    for run in block.ways(("baseline", "none", "activation", "all")).values():
        output = run()
        (output * torch.linspace(0, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
        gradients = [block.x.grad, *(p.grad for p in block.moe.experts.parameters())]
        if gradients[1] is None:
            gradients = [block.x.grad, *(p.grad for p in block.baseline.experts.parameters())]
        results.append([output.detach(), *(g.clone() for g in gradients)])
        block.forget()
    for found in results[1:]:
        assert all(
            torch.allclose(one, other, rtol=1e-10, atol=1e-12) for one, other in zip(found, results[0], strict=True)
        )
    assert block.check() < 1e-10


def test_baseline__other_numbers_are_not_timed():
    block = Block(TINY, batch=2, experts=2, routing="dense", dtype=torch.float32)
    with torch.no_grad():
        block.baseline.gate.bias.add_(torch.tensor([1.0, 0.0]))
    with pytest.raises(RuntimeError, match="nothing is timed"):
        block.check()


def test_tower__the_obvious_one_has_the_features_of_covft():
    tower = Tower(TINY, batch=2)
    own, obvious = tower.wrapped().eval(), tower.obvious().eval()
    with torch.no_grad():
        one, other = tower.forward(own)(), tower.forward(obvious)()
    assert torch.allclose(one, other, atol=1e-5)


def test_tower__other_features_are_not_timed(monkeypatch):
    def other(self):
        encoder = obvious(self)
        with torch.no_grad():
            encoder.vit.get_submodule(encoder.spec.blocks[1].mlp_path).moe.experts[0].fc2.bias.add_(1)
        return encoder

    obvious = Tower.obvious
    monkeypatch.setattr(Tower, "obvious", other)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        next(measure_tower(TINY, runs=1))


def test_measure__counts_what_it_says():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    assert flops(lambda: x @ weight.t()) == 2 * 4 * 8 * 16
    # The product keeps both factors, the exponential its result.
    assert bytes_for_backward(lambda: (x @ weight.t()).exp(), [weight]) == 4 * 8 * 4 + 4 * 16 * 4
    timings = interleaved({"a": lambda: None, "b": lambda: torch.ones(2)}, runs=3)
    assert all(len(timing.runs) == 3 and timing.best <= timing.median for timing in timings.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_measure__sees_the_peak_of_what_is_given_back():
    size = 1 << 27

    def function():
        for _ in range(2):
            torch.ones(size // 4)

    assert 0.9 * size < peak_memory(function) < 1.5 * size


BRIEF = (("block",), ("compressed",))
ALL = (("block", "batches", "experts", "tower", "variants"), ("compressed", "wrap"))


@pytest.mark.parametrize(
    ("runs", "kinds", "headings"),
    [
        (BRIEF, {"block", "compressed"}, ["One block, float32, 2 images", "Compressed experts"]),
        pytest.param(
            ALL,
            {"block", "tower", "compressed", "wrap"},
            [
                *("Goals", "One block, float32, 2 images", "Over the batch", "Over the number of experts"),
                *("The whole tower", "Compressed experts", "wrap()"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["brief", "all"],
)
def test_command__writes_results_page_and_plots(tmp_path, runs, kinds, headings):
    import typer

    app = typer.Typer()
    app.command()(main)
    options = ["--tiny", "--runs", "2", "--output", str(tmp_path / "results"), "--pages", str(tmp_path / "page")]
    for parts in runs:  # the second adds to the results of the first
        result = CliRunner().invoke(app, [*options, *(word for part in parts for word in ("--part", part))])
        assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results" / "results.json").read_text())["records"]
    assert {record["kind"] for record in records} == kinds
    page = (tmp_path / "page" / "index.md").read_text()
    for heading in headings:
        assert f"## {heading}" in page
    assert (tmp_path / "page" / "block.svg").is_file()
