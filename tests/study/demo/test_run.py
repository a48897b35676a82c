"""The page, and the complete demo."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from study.backbone_check import BackboneCheck
from study.data.scenes import make_scenes
from study.data.tasks import TASKS, make_examples
from study.demo.inspection import examples_shown
from study.demo.page import Contents, write_page
from study.demo.run import run_demo
from study.demo.scores import difference_table, groups_of_runs, score_table
from study.demo.settings import DemoSettings
from study.results.load import Row

IMAGE = "data:image/png;base64,"


def _contents(methods: tuple[str, ...]) -> Contents:
    scenes = make_scenes("test", 9)
    examples = make_examples(scenes)
    runs, rows = DemoSettings(methods=methods).runs(), {}
    rng = np.random.default_rng()
    for name, run in runs.items():
        hits = {task: (rng.random(30) < 0.5).astype(float) for task in TASKS}
        scores = {task: 100 * float(found.mean()) for task, found in hits.items()}
        kept: dict = {"answers": [examples[row].answer for row in examples_shown(examples)]}
        if name == "frozen":
            kept["answers"][0] = "<b>"
        if name == "covft":
            kept["weights"] = {"2": {task: [0.1, 0.2, 0.3, 0.4] for task in TASKS}}
            kept["contexts"] = {"2": {"share": 0.5, "points": {task: [[0.0, 1.0], [1.0, 0.5]] for task in TASKS}}}
            kept["saved"] = {"loaded": 0.0, "pretrained": 1.5}
        rows[run.name] = Row(
            run.name, run.label, ("demo",), run.to_dict(), 0, "test", scores, hits, losses=(2.0, 1.5, 1.0),
            seconds={"train": 61.0}, more={"inspection": kept},
        )  # fmt: skip
    groups = groups_of_runs(rows, runs)
    tables = [score_table(groups, {}), difference_table(groups)]
    pictures = np.stack([scene.pixels for scene in scenes])
    return Contents(groups, tables, pictures, examples, BackboneCheck(1e-6, [5.0, 4.0, 3.0], 3, 1000), 99.0)


@pytest.mark.long
def test_the_page_shows_every_part(tmp_path: Path) -> None:
    contents = _contents(("frozen", "full", "covft", "covft-shuffled"))
    write_page(tmp_path / "index.html", contents)
    page = (tmp_path / "index.html").read_text()
    assert page.count(IMAGE) == 8 + 3
    for task in TASKS:
        score = f"{contents.groups['covft'].first.scores[task]:.1f}"
        assert re.search(rf"<td>{task}</td>.*{re.escape(score)} \[", page)
    assert "covft, minus covft, texts shuffled" in page
    # the wrong answer is escaped and the correct one stands below it
    assert '<span class="bad">&lt;b&gt;</span>' in page
    assert f"correct: {contents.examples[examples_shown(contents.examples)[0]].answer}" in page
    assert "1.5e+00" in page
    for part in ("http", "<script"):
        assert part not in page


@pytest.mark.long
def test_without_covft_the_page_has_no_routing(tmp_path: Path) -> None:
    write_page(tmp_path / "index.html", _contents(("frozen",)))
    page = (tmp_path / "index.html").read_text()
    assert page.count(IMAGE) == 8 + 1
    assert "Expert weights" not in page
    assert "minus" not in page


@pytest.mark.slow
def test_the_complete_demo_writes_its_page_and_goes_on_from_its_rows(tmp_path: Path) -> None:
    settings = DemoSettings.quick(output=tmp_path / "out", show=False)
    contents = run_demo(settings)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count(IMAGE) == 8 + 3
    assert str(tmp_path) not in page
    assert (tmp_path / "out" / "encoder" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "tables.md").read_text().startswith("| task | frozen | full | covft |")
    assert contents.groups["covft"].first.more["inspection"]["saved"]["loaded"] < 1e-5
    assert contents.backbone.difference < 1e-5
    assert contents.backbone.trained > 0
    dates = {name: group.first.date for name, group in contents.groups.items()}
    again = run_demo(settings)
    assert {name: group.first.date for name, group in again.groups.items()} == dates
    # the same start and the same data: the first losses of frozen and covft agree, since wrapping changes nothing
    first = {name: group.first.losses[0] for name, group in contents.groups.items()}
    assert first["frozen"] == pytest.approx(first["covft"], rel=1e-4)
    assert first["frozen"] == pytest.approx(first["full"], rel=1e-4)
