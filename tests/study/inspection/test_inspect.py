"""A very small run is inspected, and its page is written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from covft.analysis import Recording, write_report
from study.inspection.conditioning import read as audit_of
from study.inspection.page import draw_maps, write_page
from study.inspection.trained import inspect_runs
from study.results.studies import Results
from study.runs.settings import RunSettings

TINY = {
    "steps": 17, "first_steps": 1, "batch": 8, "train_scenes": 40, "held_out_scenes": 24, "held_out_questions": 6,
    "text_encoder": "bag_of_words",
}  # fmt: skip

pytestmark = pytest.mark.long


def test_a_run_is_inspected_and_shown(tmp_path):
    settings = RunSettings(**TINY)
    files = inspect_runs(settings, tmp_path / "encoder", tmp_path / "results")
    covft, full, distance, *_ = (json.loads(file.read_text()) for file in files)
    assert len(files) == 5, "distances with three seeds"
    assert [one["settings"]["method"] for one in (covft, full)] == ["covft", "full"]
    assert all(len(one["updates"][name]) == 9 for one in (covft, full) for name in ("tower", "ffns"))
    assert full["updates"]["tower"] != full["updates"]["ffns"]

    recording = Recording.load(tmp_path / "encoder")
    found, before = covft["trained_tower"], covft["untrained_tower"]
    assert found["samples"] == len(recording) == len(found["contexts"]["labels"])
    assert found["contexts"]["tasks"] == list(recording.kinds)
    by_task = found["routing"]["layers"]["4"]["by_task"]
    own = recording.weights[4][np.array(recording.kinds) == "count"].mean(0)
    np.testing.assert_allclose(by_task["count"], own, atol=1e-3)
    assert before["experts"]["4"] == [0.0, 0.0]
    assert found["experts"]["4"][1] > 0
    assert write_report(tmp_path / "encoder").is_file()

    own = audit_of(found["audit"])
    assert set(own.scores) == {"right", "swapped", "generic", "blank"}
    assert own.images == len(set(found["audit"]["pictures"])) > 5
    assert distance["steps"] == [2, 4, 6, 8, 11, 13, 15, 17]
    for pair in distance["pairs"].values():
        assert [step[""][0] for step in pair] == pytest.approx(
            [sum(value[0] ** 2 for name, value in step.items() if name) ** 0.5 for step in pair], rel=0.2
        ), "most of the weights are in the blocks"
        assert list(pair[-1]) == ["0", "1", "2", "3", "4", ""], "the last block is not read"

    stamps = [file.stat().st_mtime_ns for file in files]
    assert inspect_runs(settings, tmp_path / "encoder", tmp_path / "results") == files
    assert [file.stat().st_mtime_ns for file in files] == stamps, "what is there stays"

    (tmp_path / "page").mkdir()
    draw_maps(tmp_path / "encoder", tmp_path / "page")
    text = write_page(Results.of("small", []), tmp_path / "page", tmp_path / "results").read_text()
    assert "## The tower of a trained covft" in text
    assert "0.76" in text
    assert "(attention.png)" in text
    assert "0.189 ± 0.051" in text
    assert "## Do towers of two tasks come apart?" in text
    assert "## Is the text used?" in text
    assert (tmp_path / "page" / "updates.svg").is_file()
