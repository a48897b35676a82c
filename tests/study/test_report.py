"""The report, from made-up measurements."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from study.data.scenes import make_scenes
from study.data.tasks import TASKS, make_examples
from study.inspection import Inspection
from study.report import Report, write_report
from study.result import StudyResult
from study.settings import StudySettings


def _report(method: str) -> Report:
    settings = StudySettings(method=method)
    scenes = make_scenes("test", 9)
    examples = make_examples(scenes)
    columns = (*settings.methods, "without the image", "without the question")
    result = StudyResult(
        scores={column: {**dict.fromkeys(TASKS, 10.0 + i), "mean": 10.0 + i} for i, column in enumerate(columns)},
        losses={"stage 1": [3.0, 2.0], **{name: [2.0, 1.0] for name in settings.methods}, "backbone": [5.0, 4.0]},
        seconds={"total": 60.0},
        checks={
            "loaded_max_difference": 0.0,
            "backbone_relative_difference": 1e-6,
            "backbone_first_loss": 5.0,
            "backbone_last_loss": 4.0,
        },
    )
    answers = {name: [example.answer for example in examples] for name in settings.methods}
    answers["frozen"][0] = "<b>"
    inspection = None
    if "covft" in settings.methods:
        rows = len(examples)
        weights = {layer: torch.rand(rows, 4).softmax(1) for layer in settings.layers}
        contexts = {layer: torch.randn(rows, 8) for layer in settings.layers}
        inspection = Inspection([example.task for example in examples], weights, contexts)
    return Report(settings, result, scenes, examples, answers, inspection)


def test_the_report_shows_every_part(tmp_path: Path) -> None:
    report = _report("both")
    write_report(tmp_path / "index.html", report)
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 8 + 3
    for task in TASKS:
        assert re.search(rf"<td>{task}</td><td[^>]*>10\.0</td><td class=\"best\">11\.0</td>", page)
    # the wrong answer is escaped and the correct one stands below it
    assert '<span class="bad">&lt;b&gt;</span>' in page
    assert f"correct: {report.examples[0].answer}" in page


def test_without_covft_the_report_has_no_routing(tmp_path: Path) -> None:
    write_report(tmp_path / "index.html", _report("frozen"))
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 8 + 1
    assert "Expert weights" not in page
