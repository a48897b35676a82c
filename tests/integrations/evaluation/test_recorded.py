"""Tables of files that the real engines wrote: their own scoring, on local rows, of answers by a rule.

`recorded/` was written by VLMEvalKit e8e78f0 with `--judge exact_matching`, for a model that gives the wrong
answer to the rows 1, 5, 9, ... of each data set, counted from 0, and the right one to all others; and by lmms-eval
0.7.3, with its own tasks over local rows. Of lmms-eval's files, only the keys that matter here are kept.
`vlmevalkit-covft/` was written by `python -m tests.real vlmevalkit`: a tiny attached model that is always wrong, but in
six of eight rows of GQA, whose answers were made its own.
"""

import json
import shutil
from pathlib import Path

import pytest

from covft.errors import EvaluationError
from covft.integrations.evaluation.benchmarks import BENCHMARKS
from covft.integrations.evaluation.paper import paper_table
from covft.integrations.evaluation.scores import read_scores
from covft.integrations.evaluation.vlmevalkit import check_results

RECORDED = Path(__file__).parent / "recorded"
# Counted by hand from the rows. MME has two rows per category: in every other one the second is wrong.
VLMEVALKIT = {
    "MME": 5 * (50 + 0) + 5 * (100 + 100),
    "MMBench-en": 100 * 2 / 4,  # four questions with two orders of options; both have to be right
    "MMBench-cn": 100 * 2 / 4,
    "GQA": 100 * 4 / 5,
    "ScienceQA": 100 * 4 / 5,
    "AI2D": 100 * 3 / 4,
    "TextVQA": 100 * 3 / 4,
    "MMVP": 100 * 2 / 4,  # four pairs
    "RealWorldQA": 100 * 4 / 6,
    "CV-Bench-COCO": 100 * 4 / 5,
    "CV-Bench-ADE": 100 * 2 / 3,
    "CV-Bench-Omni3D": 100 * 3 / 4,
    "OCRVQA": 100 * 3 / 4,
}

LMMS_EVAL = {
    "MME": 5 * (50 + 0) + 5 * (100 + 100),
    "MMBench-en": 100 / 3,  # three questions with two orders of options
    "GQA": 100 * 4 / 5,
    "ScienceQA": 100 * 4 / 5,
    "AI2D": 100 * 3 / 4,
    "TextVQA": 100 * 3 / 4,
    "MMVP": 100 * 2 / 4,
    "RealWorldQA": 100 * 3 / 4,
    "CV-Bench-COCO": 100 * 4 / 5,
    "CV-Bench-ADE": 100 * 2 / 3,
    "CV-Bench-Omni3D": 100 * 3 / 4,
}


def test_lmms_eval():
    found = read_scores(RECORDED / "lmms-eval")
    assert found.values == pytest.approx(LMMS_EVAL)
    assert found.missing == {"MMBench-cn": "mmbench_cn_dev was not run"}, "it needs a judge"
    assert found.partial == {}


def test_vlmevalkit():
    found = read_scores(RECORDED / "vlmevalkit", list(BENCHMARKS["vlmevalkit"]))
    captions = found.values["COCO captions"]
    assert found.values == pytest.approx({**VLMEVALKIT, "COCO captions": captions})
    assert captions == json.loads(found.files["COCO captions"].read_text())["CIDEr"]
    assert list(found.missing) == ["PathVQA"], "it needs a judge"
    assert paper_table(RECORDED / "vlmevalkit").mean == pytest.approx(
        (sum(VLMEVALKIT.values()) - VLMEVALKIT["OCRVQA"] - VLMEVALKIT["MME"] * 19 / 20) / 12
    )


def test_vlmevalkit__a_run_of_an_attached_model(tmp_path):
    recorded = RECORDED / "vlmevalkit-covft"
    check_results(recorded, {})
    table = paper_table(recorded)
    assert {name: score for name, score in read_scores(recorded).values.items() if score} == {"GQA": 75.0}
    assert table.mean == pytest.approx(75 / 12)

    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    (path,) = run.glob("*/*/status.json")
    states = json.loads(path.read_text())
    del states["datasets"]["MMVP"]["metrics"]
    states["datasets"]["MME"]["error_message"] = "no disk"
    path.write_text(json.dumps(states))
    with pytest.raises(
        EvaluationError, match=r"(?s)MME: no disk.*MMVP: it ended in the state 'done', without a metric"
    ):
        check_results(run, {})
