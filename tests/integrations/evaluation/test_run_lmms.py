"""The command line of lmms-eval and its result files; those of fixtures are of a real run."""

import json
import sys
from pathlib import Path

import pytest

from covft.errors import ConfigError, EvaluationError
from covft.integrations.evaluation import run_lmms
from covft.integrations.evaluation.run_lmms import command, read_results
from covft.integrations.evaluation.scores import lmms_results

RECORDED = Path(__file__).with_name("recorded") / "lmms-tiny"


@pytest.fixture
def folder(tmp_path):
    """A folder as an attached model is saved to, without weights."""

    def write(model_type="llava", config="config.json"):
        (tmp_path / "covft").mkdir(exist_ok=True)
        (tmp_path / "covft" / "covft_config.json").write_text("{}")
        (tmp_path / config).write_text(json.dumps({"model_type": model_type}))
        return str(tmp_path)

    return write


def option(words, name):
    assert words.count(name) == 1
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("model_type", "model"),
    [
        ("llava", "covft_llava_hf"),
        ("llava_next", "covft_llava_hf"),
        ("llava_onevision", "covft_llava_onevision"),
        ("qwen2_5_vl", "covft_qwen2_5_vl"),
        ("qwen3_vl", "covft_qwen3_vl"),
        ("internvl", "covft_internvl_hf"),
        ("idefics3", "covft_huggingface"),
    ],
)
def test_command__one_process(folder, model_type, model):
    where = folder(model_type)
    words = command(where, ["gqa", "mme"], "out", options={"text_encoder": "bert", "dtype": None})
    assert words[:3] == [sys.executable, "-m", "lmms_eval"]
    assert option(words, "--model") == model
    assert option(words, "--model_args") == f"pretrained={where},text_encoder=bert"
    assert option(words, "--tasks") == "gqa,mme"
    assert option(words, "--output_path") == "out"
    assert words[-1] == "--log_samples"


def test_command__arguments_of_the_engine_come_last_and_those_of_the_model_are_added(folder):
    where = folder()
    extra = ["--limit", "8", "--model_args", "use_cache=False", "--model_args=max_frames_num=4", "--batch_size", "2"]
    words = command(where, ["gqa"], "out", extra=extra)
    assert option(words, "--model_args") == f"pretrained={where},use_cache=False,max_frames_num=4"
    assert words[-4:] == ["--limit", "8", "--batch_size", "2"]  # the last one counts for argparse


@pytest.mark.parametrize("cuda", [True, False])
def test_command__several_processes(folder, cuda):
    words = command(folder(), ["gqa"], "out", processes=4, cuda=cuda)
    prefix = [] if cuda else ["env", "ACCELERATE_USE_CPU=true"]
    assert words[: len(prefix) + 3] == [*prefix, sys.executable, "-m", "accelerate.commands.launch"]
    assert option(words, "--num_processes") == "4"
    assert words[words.index("lmms_eval") - 1] == "-m"


def test_command__of_an_adapter_takes_the_type_of_its_base(folder, tmp_path):
    where = folder("ignored", "adapter_config.json")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "internvl"}')
    assert option(command(where, ["gqa"], "out", options={"base": str(base)}), "--model") == "covft_internvl_hf"
    assert option(command(where, ["gqa"], "out"), "--model") == "covft_huggingface"


def test_command__refuses_what_it_cannot_evaluate(folder, tmp_path):
    with pytest.raises(ConfigError, match="was not trained with covft"):
        command(str(tmp_path), ["gqa"], "out")
    with pytest.raises(ConfigError, match="no comma"):
        command(folder(), ["gqa"], "out", options={"text_encoder": "a,b"})


def test_results__of_a_real_run():
    [path] = lmms_results(RECORDED)
    found = read_results(path, ["tiny"])
    answers = [json.loads(line) for line in found.samples["tiny"].read_text(encoding="utf-8").splitlines()]
    assert [(score.task, score.metric, score.samples) for score in found.scores] == [("tiny", "even", 9)]
    assert found.scores[0].value == sum(row["even"] for row in answers) / 9


def test_results__a_task_without_a_number_is_an_error(tmp_path):
    [path] = lmms_results(RECORDED)
    with pytest.raises(EvaluationError, match="no numbers for gqa"):
        read_results(path, ["tiny", "gqa"])
    content = json.loads(path.read_text(encoding="utf-8"))
    for value in (float("nan"), "N/A", True, None):
        content["results"]["tiny"]["even,none"] = value
        (tmp_path / "x_results.json").write_text(json.dumps(content))
        with pytest.raises(EvaluationError, match="no numbers for tiny"):
            read_results(tmp_path / "x_results.json", ["tiny"])


def test_results__a_group_has_the_numbers_of_its_members_and_a_pattern_any(tmp_path):
    content = {
        "results": {"a_1": {"alias": "a_1", "acc,none": 0.5, "acc_stderr,none": "N/A"}, "a": {"alias": "a"}},
        "group_subtasks": {"a": ["a_1"]},
        "n-samples": {"a_1": {"original": 10, "effective": 4}},
    }
    path = tmp_path / "2026_results.json"
    path.write_text(json.dumps(content))
    for asked in ("a", "a_1", "a_*", "tasks/a_1.yaml"):
        assert read_results(path, [asked]).scores == (run_lmms.Score("a_1", "acc", 0.5, None, 4),)
    with pytest.raises(EvaluationError, match="no numbers for b"):
        read_results(path, ["b"])


@pytest.mark.parametrize("content", ['{"results": {"tiny"', "[]", "{}"])
def test_results__a_damaged_file_is_an_error(tmp_path, content):
    path = tmp_path / "x_results.json"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=r"x_results\.json is damaged"):
        read_results(path, ["tiny"])
