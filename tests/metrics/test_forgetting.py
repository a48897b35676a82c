"""E, F and O, worked by hand."""

import pytest

from covft.errors import ConfigError
from covft.metrics import forgetting, forgotten, improvement, overall

BEFORE = {"IconQA": 20, "PathVQA": 30, "GQA": 62, "TextVQA": 58, "MME": 1500}
AFTER = {"IconQA": 80, "PathVQA": 40, "GQA": 58, "TextVQA": 60, "MME": 1380}
DOWNSTREAM, UPSTREAM = ("IconQA", "PathVQA"), ("GQA", "TextVQA", "MME")


def test_hand_worked_report():
    report = forgetting(BEFORE, AFTER, downstream=DOWNSTREAM, upstream=UPSTREAM)
    assert report.improvement == (60 + 10) / 2
    assert report.forgotten == pytest.approx((4 - 2 + 6) / 3)  # MME: 75 to 69
    assert report.overall == pytest.approx((60 + (58 + 60 + 69) / 3) / 2)
    assert report.downstream == {"IconQA": (20, 80), "PathVQA": (30, 40)}
    assert report.upstream["MME"] == (75, 69)


def test_text_of_the_report():
    report = forgetting(BEFORE, AFTER, downstream=DOWNSTREAM, upstream=UPSTREAM)
    assert str(report).splitlines() == [
        "E +35.00   F +2.67   O 61.17",
        "downstream    before   after  change",
        "  IconQA       20.00   80.00  +60.00",
        "  PathVQA      30.00   40.00  +10.00",
        "upstream      before   after  change",
        "  GQA          62.00   58.00   -4.00",
        "  TextVQA      58.00   60.00   +2.00",
        "  MME          75.00   69.00   -6.00",
    ]


def test_parts_alone():
    assert improvement({"a": 10, "b": 20}, {"b": 30, "a": 10}) == 5.0
    assert forgotten({"a": 10, "b": 20}, {"b": 30, "a": 10}) == -5.0
    assert str(forgotten({"a": 10}, {"a": 10})) == "0.0"
    # Both sides count the same, not every set.
    assert overall({"a": 90}, {"b": 10, "c": 20, "d": 30}) == 55.0


@pytest.mark.parametrize(
    ("downstream", "upstream"),
    [(["IconQA"], []), ([], ["GQA"]), (["IconQA", "GQA"], ["GQA"]), (["IconQA"], ["AI2D"]), (["AI2D"], ["GQA"])],
)
def test_sets_that_make_no_report_are_refused(downstream, upstream):
    with pytest.raises(ConfigError):
        forgetting(BEFORE, AFTER, downstream=downstream, upstream=upstream)


def test_scores_of_other_sets_are_refused():
    with pytest.raises(ConfigError, match="other sets"):
        improvement({"a": 1}, {"b": 1})
    with pytest.raises(ConfigError, match="AI2D"):
        forgetting(BEFORE, {**AFTER, "AI2D": 1}, downstream=["AI2D"], upstream=["GQA"])
