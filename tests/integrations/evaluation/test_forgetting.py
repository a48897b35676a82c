"""E, F and O from the result files of two models."""

import pytest

from covft.errors import EvaluationError
from covft.integrations.evaluation.forgetting import forgetting_table
from tests.helpers.evaluations import write_lmms

BEFORE = {"mme": 1400.0, "gqa": 0.6, "coco2017_cap_val": 1.1, "scienceqa_img": 0.5, "iconqa_test": 0.2}
AFTER = {"mme": 1200.0, "gqa": 0.5, "coco2017_cap_val": 1.0, "scienceqa_img": 0.8, "iconqa_test": 0.7}


def test_three_numbers_over_the_sets_that_both_have(tmp_path):
    write_lmms(tmp_path / "before", {**BEFORE, "textvqa_val": 0.5})
    write_lmms(tmp_path / "after", {**AFTER, "ok_vqa_val2014": 0.4}, asked={"gqa": 9})
    table = forgetting_table(tmp_path / "before", tmp_path / "after")
    report = table.report
    assert report.improvement == pytest.approx(((80 - 50) + (70 - 20)) / 2)
    assert report.forgotten == pytest.approx(((70 - 60) + (60 - 50) + (110 - 100)) / 3)
    assert report.overall == pytest.approx(((80 + 70) / 2 + (60 + 50 + 100) / 3) / 2)
    assert table.missing == {
        "OKVQA": "before: ok_vqa_val2014 was not run",
        "TextVQA": "after: textvqa_val was not run",
        "OCRVQA": "before: lmms-eval does not have it; after: lmms-eval does not have it",
        "RSVQA": "before: lmms-eval does not have it; after: lmms-eval does not have it",
        "PathVQA": "before: lmms-eval does not have it; after: lmms-eval does not have it",
        "Flickr30k": "before: flickr30k_test was not run; after: flickr30k_test was not run",
    }
    assert table.partial == {"GQA": (9, 100)}
    assert "5 of 11 sets" in str(table)
    assert "partial   GQA: 9 of 100 questions" in str(table)


def test_one_side_without_a_set(tmp_path):
    write_lmms(tmp_path / "before", {"gqa": 0.5})
    write_lmms(tmp_path / "after", {"gqa": 0.5})
    with pytest.raises(EvaluationError, match="no downstream set"):
        forgetting_table(tmp_path / "before", tmp_path / "after")


def test_two_engines_are_not_compared(tmp_path):
    write_lmms(tmp_path / "before", BEFORE)
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "m_ScienceQA_TEST_acc.csv").write_text('"Overall"\n"0.8"\n')
    with pytest.raises(EvaluationError, match="lmms-eval before and vlmevalkit after"):
        forgetting_table(tmp_path / "before", tmp_path / "after")
