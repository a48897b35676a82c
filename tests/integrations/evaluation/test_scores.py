"""Scores from an engine's files: the right numbers, and reasons where there are none."""

import json

import pytest

from covft.errors import ConfigError, EvaluationError
from covft.integrations.evaluation.scores import read_scores
from tests.helpers.evaluations import EXPECTED, LMMS_VALUES, SOURCES, write_lmms


def test_lmms_eval__every_task_on_the_paper_s_scale(tmp_path):
    path = write_lmms(tmp_path / "model", LMMS_VALUES, sources=SOURCES)
    found = read_scores(tmp_path)
    assert found.engine == "lmms-eval"
    assert found.values == pytest.approx(EXPECTED)
    assert (found.missing, found.partial) == ({}, {})
    assert set(found.files.values()) == {path}
    assert read_scores(path).values == found.values, "the file alone"


def test_lmms_eval__what_is_missing_has_a_reason_and_no_score(tmp_path):
    write_lmms(tmp_path, {"mme": 2345.0, "gqa": float("nan"), "textvqa_val": "N/A", "ai2d": 0.5, "cv_bench_2d": 0.5})
    found = read_scores(tmp_path)
    assert found.values == {"AI2D": 50.0}
    assert found.missing["MMVP"] == "mmvp was not run"
    assert "out of 0 to 2000" in found.missing["MME"]
    assert "nan" in found.missing["GQA"]
    assert "N/A" in found.missing["TextVQA"]
    assert "--log_samples" in found.missing["CV-Bench-ADE"]
    assert len(found.missing) == 11


def test_lmms_eval__a_metric_of_another_name_or_twice(tmp_path):
    path = write_lmms(tmp_path, {"gqa": 0.5, "ai2d": 0.5})
    content = json.loads(path.read_text())
    content["results"]["gqa"] = {"accuracy,none": 0.5}
    content["results"]["ai2d"]["exact_match,none"] = 0.4
    path.write_text(json.dumps(content))
    missing = read_scores(tmp_path).missing
    assert missing["GQA"] == "gqa has no exact_match"
    assert missing["AI2D"] == "ai2d has exact_match 2 times, by filter"


def test_lmms_eval__the_last_run_of_a_task_counts(tmp_path):
    write_lmms(tmp_path, {"gqa": 0.1, "mmvp": 0.2}, stamp="20261101_120000", asked={"gqa": 8, "mmvp": 8})
    write_lmms(tmp_path, {"gqa": 0.6}, stamp="20261102_080000")
    found = read_scores(tmp_path, ["GQA", "MMVP"])
    assert found.values == pytest.approx({"GQA": 60.0, "MMVP": 20.0})
    assert found.partial == {"MMVP": (8, 100)}


def test_lmms_eval__several_models_are_refused(tmp_path):
    write_lmms(tmp_path / "one", {"gqa": 0.1}, args="pretrained=one")
    write_lmms(tmp_path / "two", {"gqa": 0.2}, args="pretrained=two")
    with pytest.raises(EvaluationError, match="several models"):
        read_scores(tmp_path)
    assert read_scores(tmp_path / "two", ["GQA"]).values == pytest.approx({"GQA": 20.0})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"results": 3}', "is damaged"), ("[" * 100_000, "is damaged")],
)
def test_lmms_eval__wrong_files(tmp_path, text, expected):
    (tmp_path / "20261101_120000_results.json").write_text(text)
    with pytest.raises(EvaluationError, match=expected):
        read_scores(tmp_path)


@pytest.mark.parametrize("line", ["{", '{"cv_bench_acc": {"source": "COCO", "is_correct": "yes"}}', "[]", "{}"])
def test_lmms_eval__wrong_samples(tmp_path, line):
    path = write_lmms(tmp_path, {"cv_bench_2d": 0.5}, sources={"COCO": (1, 2)})
    samples = path.with_name("20261101_120000_samples_cv_bench_2d.jsonl")
    assert "ADE20K" in read_scores(tmp_path).missing["CV-Bench-ADE"]
    samples.write_text(samples.read_text() + line)
    with pytest.raises(EvaluationError, match="cv_bench_2d"):
        read_scores(tmp_path)


def write_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [columns, *zip(*columns.values(), strict=True)]
    path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))


def test_vlmevalkit__last_run__links_and_other_data_sets(tmp_path):
    old, new = tmp_path / "covft" / "T20260818-101500", tmp_path / "covft" / "T20260819-090000"
    write_table(old / "covft_MMVP_acc.csv", {"Average": [0.5], "Overall": [0.1]})
    write_table(new / "covft_MMVP_acc.csv", {"Average": [0.7], "Overall": [0.3]})
    write_table(new / "covft_MMBench_DEV_EN_V11_acc.csv", {"split": ["dev"], "Overall": [0.9]})
    (tmp_path / "covft" / "covft_MMVP_acc.csv").symlink_to(new / "covft_MMVP_acc.csv")
    found = read_scores(tmp_path)
    assert found.engine == "vlmevalkit"
    assert found.values == pytest.approx({"MMVP": 30.0})
    assert found.missing["MMBench-en"] == "MMBench_DEV_EN was not run"


def test_vlmevalkit__tables_that_cannot_be_used(tmp_path):
    write_table(tmp_path / "m_AI2D_TEST_acc.csv", {"split": ["a", "b"], "Overall": [0.5, 0.6]})
    write_table(tmp_path / "m_MMVP_acc.csv", {"Average": [0.5]})
    write_table(tmp_path / "m_RealWorldQA_acc.csv", {"Overall": [50.0]})
    missing = read_scores(tmp_path).missing
    assert missing["AI2D"] == "m_AI2D_TEST_acc.csv has 2 rows, where one split is expected"
    assert missing["MMVP"] == "m_MMVP_acc.csv has no column Overall"
    assert missing["RealWorldQA"] == "Overall of RealWorldQA is 50, out of 0 to 1"
    (tmp_path / "m_MMVP_acc.csv").write_text('"Overall"\n"0.5')
    with pytest.raises(EvaluationError, match="is damaged"):
        read_scores(tmp_path)
    (tmp_path / "other_MMVP_acc.csv").write_text('"Overall"\n"0.5"')
    with pytest.raises(EvaluationError, match="several models"):
        read_scores(tmp_path)


@pytest.mark.parametrize("content", [[{"Overall": 0.5}], {"Overall": {"0": 0.5}}, {"Overall": 0.5}])
def test_vlmevalkit__json_of_every_shape(tmp_path, content):
    (tmp_path / "m_MMVP_acc.json").write_text(json.dumps(content))
    assert read_scores(tmp_path, ["MMVP"]).values == {"MMVP": 50.0}


def test_which_engine(tmp_path):
    with pytest.raises(EvaluationError, match="has no results"):
        read_scores(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(EvaluationError, match=r"notes\.txt"):
        read_scores(tmp_path)
    write_table(tmp_path / "m_MMVP_acc.csv", {"Overall": [0.3]})
    write_lmms(tmp_path, {"mmvp": 0.4})
    with pytest.raises(EvaluationError, match="lmms-eval and of vlmevalkit"):
        read_scores(tmp_path)
    assert read_scores(tmp_path, ["MMVP"], engine="vlmevalkit").values == pytest.approx({"MMVP": 30.0})
    assert read_scores(tmp_path, ["MMVP"], engine="lmms-eval").values == pytest.approx({"MMVP": 40.0})
    with pytest.raises(ConfigError, match="is not known"):
        read_scores(tmp_path, engine="other")
