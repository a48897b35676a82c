"""`covft evaluate`, with a stand-in for the engine's command where it has to run."""

import json
import shlex
import sys

import pytest

from covft.cli import main
from covft.commands import evaluate as command
from covft.errors import EvaluationError


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "llava-covft"
    (place / "covft").mkdir(parents=True)
    (place / "covft" / "covft_config.json").write_text("{}")
    (place / "config.json").write_text('{"model_type": "llava"}')
    return place


def run(capfd, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments)])
    captured = capfd.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_dry__prints_the_command(folder, capfd):
    code, out, _ = run(capfd, folder, "--tasks", "GQA,ai2d", "--text", "swapped", "--dry", "--", "--limit", "8")
    words = shlex.split(out)
    assert code == 0
    assert words[:3] == [sys.executable, "-m", "lmms_eval"]
    assert words[words.index("--model_args") + 1] == f"pretrained={folder},text=swapped"
    assert words[words.index("--tasks") + 1] == "gqa,ai2d"
    assert words[words.index("--output_path") + 1] == "evaluation/llava-covft-swapped"
    assert words[-2:] == ["--limit", "8"]


def test_dry__of_the_paper_names_eleven_tasks_for_each_engine(folder, capfd):
    _, out, _ = run(capfd, folder, "--dry")
    assert (
        len(shlex.split(out)[shlex.split(out).index("--tasks") + 1].split(",")) == 11
    )  # CV-Bench 2D has two of twelve
    _, out, _ = run(capfd, folder, "--dry", "--engine", "vlmevalkit", "--run", "run.py")
    assert {"MME", "MMVP", "CV-Bench-3D"} < set(shlex.split(out))


def test_refuses__an_engine_and_a_folder_that_it_does_not_know(folder, capfd, tmp_path):
    code, _, err = run(capfd, folder, "--engine", "other")
    assert code == 2
    assert "lmms-eval | vlmevalkit" in err
    code, _, err = run(capfd, tmp_path, "--dry")
    assert code == 2
    assert "was not trained with covft" in err


# A stand-in for lmms-eval: it ends with the status, and writes the scores, that it is told.
STAND_IN = """
import json, pathlib, sys
status, scores, place = int(sys.argv[1]), json.loads(sys.argv[2]), pathlib.Path(sys.argv[3])
print("Error during evaluation: no such thing")
if scores:
    (place / "model").mkdir(parents=True)
    content = {"results": {task: {"acc,none": value} for task, value in scores.items()}}
    (place / "model" / "2026_results.json").write_text(json.dumps(content))
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("status", "scores", "said"),
    [
        (0, {}, "wrote no results"),
        (1, {"gqa": 0.5}, "failed"),
        (0, {"mme": 0.5}, "no numbers for gqa"),
        (0, {"gqa": float("nan")}, "no numbers for gqa"),
    ],
)
def test_results_decide__not_the_exit_status(tmp_path, status, scores, said):
    words = [sys.executable, "-c", STAND_IN, str(status), json.dumps(scores), str(tmp_path)]
    with pytest.raises(EvaluationError, match=said) as caught:
        command._evaluate_lmms(words, tmp_path, ["gqa"])
    if not scores:
        assert "Error during evaluation: no such thing" in str(caught.value)
    assert (tmp_path / "lmms-eval.log").read_text().startswith("Error during evaluation")


def test_results__of_an_earlier_run_do_not_count(tmp_path, capfd):
    good = [sys.executable, "-c", STAND_IN, "0", '{"gqa": 0.25}', str(tmp_path)]
    command._evaluate_lmms(good, tmp_path, ["gqa"])
    assert "0.2500" in capfd.readouterr().out
    with pytest.raises(EvaluationError, match="wrote no results"):
        command._evaluate_lmms([*good[:3], "0", "{}", str(tmp_path)], tmp_path, ["gqa"])
