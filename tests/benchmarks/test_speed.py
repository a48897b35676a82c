"""The speed benchmark: its two sides compute the same, and its command writes what it says."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks.speed import cuda_page, report
from benchmarks.speed.__main__ import PARTS, main
from benchmarks.speed.baseline import ObviousMoE
from benchmarks.speed.block import Block, measure_products
from benchmarks.speed.llava import LLAVA_7B, METHODS, TOY, Llava
from benchmarks.speed.measure import bytes_for_backward, flops, interleaved, peak_memory
from benchmarks.speed.sizes import TINY
from benchmarks.speed.tower import Tower, measure_tower

ROOT = Path(__file__).resolve().parents[2]


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
    results = []

    def forward():
        results.append(weakref.ref(output := x.exp()))  # which the product's own node keeps
        return output

    assert bytes_for_backward(forward) == 4 * 4 * 8
    assert results[0]() is None
    timings = interleaved({"a": lambda: None, "b": lambda: torch.ones(2)}, runs=3)
    assert all(len(timing.runs) == 3 and timing.best <= timing.median for timing in timings.values())


def test_measure__counts_products_that_are_added_in_place():
    total, left, right = torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(4, 5)
    assert flops(lambda: total.addmm_(left, right)) == flops(lambda: left @ right) == 2 * 3 * 4 * 5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_measure__sees_the_peak_of_what_is_given_back():
    size = 1 << 27

    def function():
        for _ in range(2):
            torch.ones(size // 4)

    assert 0.9 * size < peak_memory(function) < 1.5 * size


def test_products__are_those_of_the_block():
    """Half of the obvious block's own operations are not in the attention, the text and the sums."""
    block = Block(TINY, batch=2, experts=4, routing="dense", dtype=torch.float32)
    (record,) = measure_products(TINY, batch=2, experts=4, dtype=torch.float32, runs=1)
    with torch.no_grad():
        experts = sum(flops(lambda e=e: e(block.x)) for e in block.moe.experts)
        whole = flops(block.ways(("all",))["all"])
    refinement = 8 * 2 * TINY.tokens * TINY.embed_dim**2
    assert record["flops"] == experts + refinement < whole < 1.2 * record["flops"]


@pytest.fixture(scope="module")
def llava():
    return Llava(TOY, "cpu")


def test_llava__each_method_trains_its_own_part_and_leaves_the_model_as_it_was(llava):
    before = {name: p.detach().clone() for name, p in llava.tower.state_dict().items()}
    counts = {}
    for method in METHODS:
        with llava.tuned(method):
            trained = llava.trained_of_tower()
            counts[method] = sum(p.numel() for p in trained)
            with torch.no_grad():  # experts are equal at the start
                logits = llava.model(**llava.batch, **llava._context(llava.text)).logits
            if method == "freeze":
                plain = logits
            assert torch.allclose(logits.float(), plain.float(), atol=0.05)
            llava.model.zero_grad()
            llava.model(**llava.batch, **llava._context(llava.text)).loss.backward()
            last = llava.tower.encoder.layers[-1]  # LLaVA reads the layer before it
            unread = {id(p) for part in (last, llava.tower.post_layernorm) for p in part.parameters()}
            unread.add(id(llava.tower.embeddings.patch_embedding.bias))
            assert all(p.grad is not None for p in trained if id(p) not in unread)
        assert not any(p.requires_grad for p in llava.tower.parameters())
        after = llava.tower.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    ours = {counts[name] for name in METHODS if name.startswith("covft")}
    assert counts["freeze"] == 0 < counts["full"] == sum(p.numel() for p in llava.tower.parameters())
    assert len(ours) == 1
    # The keys' text columns and biases, which change nothing and which covft leaves out.
    dead = len(TINY.layers) * (TINY.text_dim**2 + TINY.text_dim)
    assert counts["obvious"] == ours.pop() + dead


def test_llava__has_the_shape_of_the_7b_model():
    """LLaVA-1.5-7B has 7,063,427,072 parameters."""
    with torch.device("meta"):
        model = Llava(LLAVA_7B, "meta").model
    count = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    assert count == 7_063_427_072


def run(tmp_path, parts):
    options = ["--device", "cpu", "--quick", "--runs", "1", "--output", str(tmp_path), "--pages", str(tmp_path)]
    main([*options, *(word for part in parts for word in ("--part", part))])
    return json.loads((tmp_path / "cpu.json").read_text())["records"]


@pytest.mark.long
def test_command__writes_results_pages_and_plots(tmp_path):
    records = run(tmp_path, ["block", "llava"])
    assert {record["kind"] for record in records} == {"block", "products", "llava"}
    page, cuda = ((tmp_path / f"{name}.md").read_text() for name in ("index", "cuda"))
    for heading in ("Goals", "One block, float32, 2 images"):
        assert f"## {heading}" in page
    for heading in ("One block", "LLaVA-1.5-7B"):
        assert f"## {heading}" in cuda
    assert "| covft, recompute=all |" in cuda.partition("LLaVA-1.5-7B")[2]
    assert (tmp_path / "block.svg").is_file()


@pytest.mark.slow
def test_command__runs_every_part(tmp_path):
    run(tmp_path, ["block"])
    records = run(tmp_path, [])  # replaces the results of the first, and adds to them
    assert {record["part"] for record in records} == set(PARTS)
    page = (tmp_path / "index.md").read_text()
    for heading in ("Over the batch", "One block, compiled", "Over the number of experts", "Compressed experts"):
        assert f"## {heading}" in page
    assert "| all, compiled |" in (tmp_path / "cuda.md").read_text()


def test_pages__are_made_from_the_results():
    results, pages = ROOT / "benchmarks" / "speed" / "results", ROOT / "docs" / "speed"
    assert (pages / "index.md").read_text() == report.page(json.loads((results / "cpu.json").read_text()))
    cuda = results / "cuda.json"
    assert (pages / "cuda.md").read_text() == cuda_page.page(json.loads(cuda.read_text()) if cuda.exists() else None)
