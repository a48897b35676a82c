"""Differences with their intervals, on rows whose differences are planted."""

import math

import numpy as np
import pytest

from study.results import contrasts
from study.results.contrasts import Term
from study.results.load import groups_of, read_rows
from tests.helpers import study_rows
from tests.helpers.study_rows import GROUPS, TWELVE, percents, write


def planted(label, scores, studies, **more):
    """Return rows of enough questions for the normal approximation."""
    return study_rows.planted(label, scores, studies, noise=0.3, questions=100, **more)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    rows = [
        *planted("frozen", percents(40), []),
        *planted("covft", percents(46, vision=12), []),
        *planted("same", percents(40), []),
        *planted("few", {"count": 50, "size": 30}, []),
        *planted("one seed", percents(44), [], seeds=(1,)),
        *planted("later", percents(44), [], seeds=(7,)),
    ]
    return {group.label: group for group in groups_of(read_rows(write(rows, tmp_path_factory.mktemp("rows"))))}


def test_a_planted_difference_is_found(groups):
    found = contrasts.difference(groups["covft"], groups["frozen"], TWELVE)
    assert found.value == pytest.approx(6 + 12 * 5 / 12)
    assert found.low < found.value < found.high
    assert (found.sign, found.negated().sign, found.seeds, found.tasks) == (1, -1, 3, 12)


def test_no_difference_is_not_found(groups):
    found = contrasts.difference(groups["same"], groups["frozen"], TWELVE)
    assert found.value == pytest.approx(0)
    assert found.sign == 0


def test_the_interval_is_that_of_paired_questions(groups):
    # of one seed, by the normal approximation of a mean over tasks with their own variances
    ours, theirs = groups["one seed"], groups["frozen"]
    found = contrasts.difference(ours, theirs, TWELVE)
    apart = [ours.rows[1].hits[task] - theirs.rows[1].hits[task] for task in TWELVE]
    error = 100 * math.sqrt(sum(np.var(d) / len(d) for d in apart)) / 12
    assert found.value == pytest.approx(4)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.seeds == 1


def test_pairing_narrows_the_interval(groups):
    paired = contrasts.difference(groups["covft"], groups["frozen"], TWELVE)
    single = [contrasts.mean(groups[label], TWELVE) for label in ("covft", "frozen")]
    assert paired.high - paired.low < math.hypot(*(each.high - each.low for each in single))


def test_a_sum_weighs_its_means(groups):
    vision, general = GROUPS["vision"], GROUPS["general"]
    terms = [
        Term(w * s, groups[label], tasks)
        for w, label in ((1, "covft"), (-1, "frozen"))
        for s, tasks in ((1, vision), (-1, general))
    ]
    assert contrasts.contrast(terms).value == pytest.approx(12)


def test_only_common_tasks_are_compared(groups):
    found = contrasts.difference(groups["few"], groups["frozen"], TWELVE)
    assert (found.value, found.tasks) == (pytest.approx(0), 2)
    assert contrasts.mean(groups["few"], TWELVE) is None


def test_without_a_common_seed_there_is_no_difference(groups):
    assert contrasts.difference(groups["later"], groups["frozen"], TWELVE) is None
    assert contrasts.wins(groups["later"], groups["frozen"], TWELVE) is None


def test_a_share_of_a_gain(groups):
    # one seed of the other gains 4 of 11
    part = [Term(1, groups["one seed"], TWELVE), Term(-1, groups["frozen"], TWELVE)]
    whole = [Term(1, groups["covft"], TWELVE), Term(-1, groups["frozen"], TWELVE)]
    found = contrasts.share(part, whole)
    assert found.value == pytest.approx(100 * 4 / 11)
    assert found.low < found.value < found.high
    # by the normal approximation of a ratio, over the one seed that both have
    gains = [
        [groups[label].rows[1].hits[task] - groups["frozen"].rows[1].hits[task] for task in TWELVE]
        for label in ("one seed", "covft")
    ]
    apart = [ours - theirs * 4 / 11 for ours, theirs in zip(*gains, strict=True)]
    error = math.sqrt(sum(np.var(d) / len(d) for d in apart)) / 12 / 0.11
    assert found.high - found.low == pytest.approx(200 * 1.96 * error, rel=0.15)
    assert contrasts.share(whole, whole).low == pytest.approx(100)
    assert contrasts.share(whole, [Term(1, groups["same"], TWELVE), Term(-1, groups["frozen"], TWELVE)]) is None


def test_wins_are_counted_and_tested(groups):
    found = contrasts.wins(groups["covft"], groups["frozen"], TWELVE)
    assert (found.won, found.lost, found.tied) == (12, 0, 0)
    assert found.p == pytest.approx(2 / 2**12)
    even = contrasts.wins(groups["same"], groups["frozen"], TWELVE)
    assert (even.won, even.lost, even.tied, even.p) == (0, 0, 12, 1)
    mixed = contrasts.wins(groups["few"], groups["frozen"], TWELVE)
    assert (mixed.won, mixed.lost, mixed.p) == (1, 1, 1)


def test_holm_by_hand(groups):
    win = contrasts.Wins
    found = contrasts.holm({"a": win(9, 3, 0, 0.01), "b": win(9, 3, 0, 0.04), "c": None, "d": win(9, 3, 0, 0.03)})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "d": 0.06})
