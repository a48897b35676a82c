"""The benchmark of all methods: its numbers are those of closed formulas, and its pages those of its results."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.methods import page
from benchmarks.methods.__main__ import main
from benchmarks.methods.cases import Case, cases
from benchmarks.methods.measure import Bench, matched
from benchmarks.speed.sizes import CLIP_L, TINY
from covft.tuning import methods

RESULT = json.loads(page.RESULTS.read_text())
D, F, C, L, ADAPTED = 1024, 4096, 768, 24, 12
FFN = 2 * D * F + D + F
BLOCK = 4 * D * D + 4 * D + FFN + 4 * D
OUTSIDE = 4 * D  # the norms before and after the blocks
LORA = 8 * D + 2 * (D + F)  # of rank 1, in one block
PATCHES, POSITIONS = 3 * 14 * 14 * D, 577 * D
CONTEXT = 4 * D * D + 5 * D + 4 * C * C + 5 * C + 2 * D * C + 3 * C * C + 3 * C  # see docs/faq.md
NORMS = 23 * 4 * D  # up to block 22
# What each trains on CLIP-L/14-336, as docs/methods gives it.
FORMULAS = {
    "frozen": 0,
    "full": L * BLOCK + OUTSIDE + PATCHES + D + POSITIONS,
    "bitfit": L * (7 * D + F) + OUTSIDE // 2,
    "layernorm": 4 * L * D + OUTSIDE,
    "top_layer": BLOCK,
    "last_layers, n=4": 4 * (4 * D * D + 2 * D * F + 9 * D + F),
    "ffn": ADAPTED * FFN,
    "lora, r=8": 8 * L * LORA,
    "lora, r=512, targets=attention": 8 * 512 * L * D,
    "dora, r=8": 8 * L * LORA + L * (5 * D + F),
    "vpt, prompts=10": L * 10 * D,
    "vpt, prompts=10, deep=False": 10 * D,
    "svpt, prompts=10": L * 10 * D,
    "qa_vit": ADAPTED * (C * 256 + 256 + 256 * D + D + 1),
    "adaln": ADAPTED * (C * 256 + 256 + 2 * (2 * 256 * D + 2 * D)),
    "cross_attention": ADAPTED * (2 * C * D + 2 * C * C + 3 * C + 3 * D + 2 * C + 1),
    "covft": ADAPTED * (4 * FFN + CONTEXT + 4 * C + 4) + NORMS,
    "covft, layers=19 to 22": 4 * (4 * FFN + CONTEXT + 4 * C + 4) + NORMS,
    "covft, expert_rank=64": ADAPTED * (4 * (2 * 64 + 1) * (D + F) + CONTEXT + 4 * C + 4) + NORMS,
}


@pytest.mark.parametrize("record", RESULT["methods"], ids=lambda record: record["name"])
def test_parameters_are_those_of_the_formulas(record):
    assert record["parameters"] == FORMULAS[record["name"]]


def test_all_methods_are_measured():
    assert [record["name"] for record in RESULT["methods"]] == [case.name for case in cases(CLIP_L)]
    built_in = {name for name, method in methods().items() if method.__module__.startswith("covft.")}
    assert {record["method"] for record in RESULT["methods"]} == {*built_in - {"q_moe"}, "covft"}  # outside the tower
    for record in RESULT["methods"]:
        times = [len(record[name]) for name in ("forward", "step", "frozen_forward", "full_step")]
        assert times == [times[0]] * 4
        assert times[0] >= 3


def test_q_moe_is_counted_in_the_connector_of_llava():
    inner = wide = 4096
    ffn = D * inner + inner + inner * wide + wide
    assert RESULT["q_moe"]["parameters"] == 4 * ffn + 4 * C * C + 5 * C + 4 * (C + 1)


def test_budget_gives_the_bytes_that_were_measured():
    for record in RESULT["methods"]:
        assert record["bytes"] == record["bytes_of_budget"], record["name"]


def test_pages_are_made_from_the_results():
    again = "run python -m benchmarks.methods, which measures nothing that is measured"
    assert page.PAGE.read_text() == page.page(RESULT), again
    index = page.PAGE.with_name(page.INDEX).read_text()
    assert index == page.indexed(index, RESULT), again


def test_each_method_has_a_page_with_its_docstring():
    for name, method in methods().items():
        if not method.__module__.startswith("covft."):
            continue
        text = (page.PAGE.parent / f"{'last_layers' if name == 'top_layer' else name}.md").read_text()
        assert f"::: {method.__module__}.{method.__name__}\n" in text


def test_a_time_is_relative_to_its_neighbours():
    record = {"forward": [4.0, 9.0, 2.0], "frozen_forward": [2.0, 3.0, 2.0], "step": [1.0], "full_step": [4.0]}
    assert page.relative(record, "forward") == 2.0
    assert page.relative(record, "step") == 0.25


@pytest.mark.long
def test_the_tower_is_as_it_was_after_each_method():
    bench = Bench(TINY)
    before = {name: p.clone() for name, p in bench.vit.state_dict().items()}
    output = bench.vit(bench.images)[0]
    for case in (Case("lora", {"r": 2}), Case("covft"), Case("vpt", {"prompts": 2})):
        assert min(bench.timed(case)) > 0
        assert bench.counted(case)["parameters"] > 0
    assert all(value.equal(before[name]) for name, value in bench.vit.state_dict().items())
    assert bench.vit(bench.images)[0].equal(output)


@pytest.mark.slow
def test_matches_are_those_of_covft():
    with torch.device("meta"):
        bench = Bench(CLIP_L)
    assert matched(bench, 8 * 512 * L * D) == RESULT["matched"]


@pytest.mark.slow
def test_command_goes_on_where_it_stopped(tmp_path, capsys):
    words = ["--quick", "--output", str(tmp_path), "--pages", str(tmp_path), "--runs"]
    main([*words, "1"])
    first = json.loads((tmp_path / "cpu.json").read_text())["methods"]
    main([*words, "2", "--method", "adaln"])
    second = json.loads((tmp_path / "cpu.json").read_text())["methods"]
    for one, other in zip(first, second, strict=True):
        assert (len(one["step"]), len(other["step"])) == (1, 2)
        assert (other["step"][0] == one["step"][0]) == (one["method"] != "adaln")
    assert {Path(file).name for file in tmp_path.iterdir()} == {"cpu.json", "cost.md", "cost.svg", "index.md"}
    assert "| [`adaln`](adaln.md) |" in (tmp_path / "cost.md").read_text()
