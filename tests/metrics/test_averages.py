"""Averages against the means that the paper prints."""

import pytest

from covft.errors import ArgumentError, ConfigError
from covft.metrics import PAPER_GROUPS, averages

# Rows of the CoVFT paper's Tables 1 and 10: twelve scores, the means of the three groups and of all.
ROWS = {
    "freeze": (
        (1473.7, 67.87, 60.30, 63.07, 69.31, 55.76, 58.53, 28.00, 56.73, 63.73, 49.61, 60.50),
        (66.23, 61.20, 51.71, 58.93),
    ),
    "full": (
        (1510.2, 67.44, 59.88, 63.92, 67.67, 56.51, 59.70, 27.33, 55.82, 65.71, 51.97, 60.00),
        (66.69, 61.29, 52.17, 59.29),
    ),
    "svpt": (
        (1431.7, 66.58, 57.90, 63.26, 68.82, 56.54, 57.89, 29.33, 56.86, 65.34, 51.03, 59.29),
        (64.83, 61.08, 52.37, 58.70),
    ),
    "covft": (
        (1525.2, 68.13, 60.40, 63.37, 69.51, 56.64, 59.64, 36.67, 57.52, 66.96, 56.08, 61.83),
        (67.04, 61.93, 55.81, 61.08),
    ),
    "freeze 13B": (
        (1557.6, 69.93, 63.57, 63.73, 72.43, 60.20, 60.18, 34.00, 55.94, 65.09, 51.34, 62.83),
        (68.78, 64.27, 53.84, 61.43),
    ),
}
ROUNDING = 0.006  # of the printed means and scores
NAMES = [name for group in PAPER_GROUPS.values() for name in group]


@pytest.mark.parametrize("row", ROWS)
def test_means_are_those_that_the_paper_prints(row):
    scores, printed = ROWS[row]
    found = averages(dict(zip(NAMES, scores, strict=True)))
    assert [*found.groups.values(), found.mean] == pytest.approx(printed, abs=ROUNDING)
    assert list(found.groups) == ["general", "knowledge and OCR", "vision-centric"]


def test_the_mean_is_of_benchmarks_not_of_groups():
    found = averages({"a": 10, "b": 20, "c": 60, "unused": 1000}, {"first": ["a", "b"], "second": ["c"]})
    assert found.groups == {"first": 15.0, "second": 60.0}
    assert found.mean == 30.0
    assert str(found) == "first 15.00, second 60.00, mean 30.00"


def test_divisors_are_a_setting():
    scores, groups = {"MME": 1500, "own": 40}, {"all": ["MME", "own"]}
    assert averages(scores, groups).mean == (75 + 40) / 2
    assert averages(scores, groups, {"own": 10}).mean == (1500 + 4) / 2
    assert averages(scores, groups, {}).mean == 770


@pytest.mark.parametrize(
    ("scores", "groups", "divisors"),
    [
        ({"a": 1}, {"x": ["a", "b"]}, {}),
        ({"a": 1}, {}, {}),
        ({"a": 1}, {"x": ["a"], "y": []}, {}),
        ({"a": 1}, {"x": ["a"]}, {"a": 0}),
    ],
)
def test_what_has_no_mean_is_refused(scores, groups, divisors):
    with pytest.raises(ConfigError):
        averages(scores, groups, divisors)


def test_the_missing_benchmark_is_named():
    with pytest.raises(ConfigError, match="score of GQA is missing"):
        averages(dict.fromkeys(set(NAMES) - {"GQA"}, 50))
    with pytest.raises(ArgumentError):
        averages({"a": float("nan")}, {"x": ["a"]})
