"""Intervals against every possible resample, sign tests against every outcome, Holm's correction by hand."""

import itertools
import math

import numpy as np
import pytest

from covft.errors import ArgumentError, ConfigError, ShapeError
from covft.metrics import bootstrap, holm, paired_bootstrap, sign_test

RUNS = {
    3: {"count": [1, 0, 1, 1], "size": [0.5, 0.0]},
    1: {"count": [0, 0, 1, 1], "size": [1.0, 1.0]},
}


def all_resamples(values):
    """The value of every possible resample, equally likely; `values` are arrays (runs, questions)."""
    runs, found = len(values[0]), []
    mean = np.mean([task.mean() for task in values])
    for drawn in itertools.product(range(runs), repeat=runs):
        for questions in itertools.product(
            *(itertools.product(range(task.shape[1]), repeat=task.shape[1]) for task in values)
        ):
            by_run = np.mean(
                [task[:, list(chosen)].mean(axis=1) for task, chosen in zip(values, questions, strict=True)], axis=0
            )
            widened = math.sqrt(runs / (runs - 1)) * (by_run[list(drawn)].mean() - by_run.mean())
            found.append(by_run.mean() + widened)
    assert np.mean(found) == pytest.approx(mean)
    return np.array(found)


def test_means_and_deviation_by_hand():
    found = bootstrap(RUNS)
    assert found.tasks == {"count": 0.625, "size": 0.625}
    assert found.mean == 0.625
    assert found.std == pytest.approx(math.sqrt(2) * (0.75 - 0.5) / 2)  # the runs have 0.5 and 0.75
    assert (found.seeds, found.level) == (2, 0.95)
    assert found.low < 0.625 < found.high


def test_interval_is_that_of_all_resamples():
    draw = np.random.default_rng(5)
    values = [draw.normal(size=(2, 3)), draw.normal(size=(2, 3))]
    runs = {seed: {str(task): values[task][seed].tolist() for task in range(2)} for seed in range(2)}
    every = all_resamples(values)
    for level in (0.5, 0.8, 0.95):
        found = bootstrap(runs, resamples=100_000, level=level)
        expected = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
        assert [found.low, found.high] == pytest.approx(expected, abs=0.02 * np.ptp(every))


def test_interval_of_one_run_is_of_its_questions():
    values = np.random.default_rng(1).normal(size=(1, 400))
    found = bootstrap({0: {"task": values[0]}}, resamples=5_000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert [found.low, found.high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
    assert found.std is None
    assert str(found).endswith("(95 %, 1 seed)")


def test_differences_are_taken_by_seed_and_question():
    other = {seed: {task: [value - 0.25 for value in values] for task, values in RUNS[seed].items()} for seed in (1, 3)}
    found = paired_bootstrap(RUNS, other)
    assert [found.mean, found.low, found.high, found.std] == pytest.approx([0.25, 0.25, 0.25, 0.0])
    assert (found.wins, found.losses) == (2, 0)
    assert found.p_value == pytest.approx(2 / 2001)
    assert str(found) == "+0.25 [0.25, 0.25] (95 %, 2 seeds)"


def test_difference_is_the_estimate_of_differences():
    draw = np.random.default_rng(2)
    a, b = draw.integers(2, size=(2, 3, 2, 20))
    named = [{seed: {f"task{t}": one[seed, t].tolist() for t in range(2)} for seed in range(3)} for one in (a, b)]
    both = paired_bootstrap(*named)
    alone = bootstrap({seed: {f"task{t}": (a - b)[seed, t] for t in range(2)} for seed in range(3)})
    assert (both.mean, both.std, both.low, both.high) == (alone.mean, alone.std, alone.low, alone.high)
    back = paired_bootstrap(*reversed(named))
    assert (back.wins, back.losses, back.mean) == (both.losses, both.wins, -both.mean)
    assert back.low == pytest.approx(-both.high, abs=0.02)


def test_p_value_is_the_share_of_resamples_beyond_zero():
    draw = np.random.default_rng(4)
    values = [draw.normal(0.4, 1, size=(2, 3)), draw.normal(0.4, 1, size=(2, 3))]
    runs = {seed: {str(task): values[task][seed] for task in range(2)} for seed in range(2)}
    zeros = {seed: {str(task): [0, 0, 0] for task in range(2)} for seed in range(2)}
    every = all_resamples(values)
    expected = 2 * min((every <= 0).mean(), (every >= 0).mean())
    assert 0.02 < expected < 0.9
    assert paired_bootstrap(runs, zeros, resamples=50_000).p_value == pytest.approx(expected, abs=0.02)
    assert paired_bootstrap(zeros, zeros).p_value == 1.0


def test_many_questions_are_drawn_in_parts():
    values = np.random.default_rng(3).normal(size=100_000)
    found = bootstrap({0: {"task": values}}, resamples=50)
    assert found.mean == pytest.approx(values.mean())
    assert 0 < found.high - found.low < 6 / math.sqrt(100_000)


def test_the_same_seed_gives_the_same_interval():
    first, again, other = (bootstrap(RUNS, seed=seed, resamples=100) for seed in (0, 0, 1))
    assert first == again != other


BAD = {
    "other seeds": (RUNS, {1: RUNS[1], 2: RUNS[3]}, "paired by seed"),
    "other tasks": (RUNS, {seed: {"count": RUNS[seed]["count"]} for seed in RUNS}, "paired by task"),
    "other questions": (RUNS, {seed: {"count": [0, 1], "size": [0, 1]} for seed in RUNS}, "paired by task"),
    "tasks of a run": ({**RUNS, 1: {"count": [1]}}, RUNS, "other tasks"),
    "questions of a run": ({**RUNS, 1: {"count": [1], "size": [0, 1]}}, RUNS, "same questions"),
    "nan": ({0: {"count": [1, float("nan")]}}, {0: {"count": [1, 1]}}, "cannot be used"),
    "words": ({0: {"count": ["yes"]}}, {0: {"count": [1]}}, "not a list of numbers"),
    "no questions": ({0: {"count": []}}, {0: {"count": []}}, "cannot be used"),
    "no tasks": ({0: {}}, {0: {}}, "empty"),
    "no runs": ({}, {}, "empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_pair_is_refused(case):
    a, b, message = BAD[case]
    with pytest.raises(ShapeError, match=message):
        paired_bootstrap(a, b)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"resamples": 0}, ConfigError),
        ({"level": 1}, ConfigError),
        ({"level": 0}, ConfigError),
        ({"seed": -1}, ConfigError),
        ({"level": "95"}, ArgumentError),
    ],
)
def test_settings_are_checked(setting, error):
    with pytest.raises(error):
        bootstrap(RUNS, **setting)


def test_sign_test_by_hand():
    assert sign_test(10, 2) == 2 * (1 + 12 + 66) / 4096
    assert sign_test(12, 0) == 2 / 4096
    assert sign_test(0, 0) == sign_test(6, 6) == 1.0
    with pytest.raises(ConfigError):
        sign_test(-1, 3)


@pytest.mark.parametrize("trials", [1, 4, 11, 12])
def test_sign_test_counts_the_outcomes_as_uneven(trials):
    uneven = [abs(2 * sum(outcome) - trials) for outcome in itertools.product((0, 1), repeat=trials)]
    for wins in range(trials + 1):
        expected = sum(one >= abs(2 * wins - trials) for one in uneven) / 2**trials
        assert sign_test(wins, trials - wins) == pytest.approx(expected, rel=1e-12)


def test_holm_by_hand():
    # Times 4, 3, 2 and 1 in ascending order, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ConfigError):
        holm([0.5, 1.5])


def test_holm_rejects_what_the_step_down_procedure_rejects():
    draw = np.random.default_rng(0)
    for count in (1, 2, 5, 13):
        p_values = (draw.random(count) ** 3).tolist()
        adjusted = holm(p_values)
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            while len(rejected) < count:
                smallest = min((i for i in range(count) if i not in rejected), key=lambda i: p_values[i])
                if p_values[smallest] > alpha / (count - len(rejected)):
                    break
                rejected.add(smallest)
            assert {i for i in range(count) if adjusted[i] <= alpha} == rejected


# What varies: (from run to run, from question to question, from answer to answer), and the coverage to expect of 95 %.
COVERAGE = {
    "questions": (5, (0, 0.5, 0.01), (0.9, 0.98)),
    "questions and answers": (5, (0, 0.35, 0.35), (0.93, 0.995)),
    "all": (5, (0.01, 0.35, 0.35), (0.93, 0.995)),
    "all, three runs": (3, (0.01, 0.35, 0.35), (0.93, 0.995)),
    "answers alone": (5, (0, 0, 0.5), (0.97, 1)),  # too wide
    "runs alone": (5, (0.02, 0, 0.001), (0.8, 0.92)),  # too narrow
    "runs alone, three": (3, (0.02, 0, 0.001), (0.7, 0.85)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERAGE)
def test_coverage_of_intervals(case):
    runs, (by_run, by_question, by_answer), (least, most) = COVERAGE[case]
    draw = np.random.default_rng(7)
    covered = 0
    for trial in range(500):
        shift = draw.normal(0, by_run, (runs, 1, 1))
        values = shift + draw.normal(0, by_question, (1, 4, 60)) + draw.normal(0, by_answer, (runs, 4, 60))
        scores = {seed: {str(task): values[seed, task] for task in range(4)} for seed in range(runs)}
        found = bootstrap(scores, resamples=500, seed=trial)
        covered += found.low <= 0 <= found.high
    assert least <= covered / 500 <= most
