"""Figures of routing agree with scikit-learn, scipy and loops over samples, on weights with a known answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import entropy, pearsonr
from sklearn.metrics import mutual_info_score

from covft.analysis.stats.routing import correlate, pair_similarities, specialisation, summarise
from covft.errors import ConfigError, ShapeError


def weights_of(draws, count, experts=4):
    return draws.dirichlet(np.ones(experts), size=count)


def test_summary_is_that_of_loops():
    draws = np.random.default_rng()
    weights, kinds = weights_of(draws, 30), [*("box", "caption", "count") * 9, None, None, None]
    found = summarise({5: weights, 7: weights[:, ::-1]}, kinds)
    assert list(found) == [5, 7]
    routing = found[5]
    np.testing.assert_allclose(routing.load, weights.mean(axis=0))
    np.testing.assert_allclose(found[7].load, weights.mean(axis=0)[::-1])
    assert routing.entropy == pytest.approx(np.mean([entropy(row) for row in weights]))
    assert routing.kinds == ("box", "caption", "count")
    for number, kind in enumerate(routing.kinds):
        own = np.array([row for row, of in zip(weights, kinds, strict=True) if of == kind])
        np.testing.assert_allclose(routing.by_kind[number], own.mean(axis=0))
        assert routing.entropy_by_kind[number] == pytest.approx(np.mean([entropy(row) for row in own]))


def test_information_of_hard_routing_is_that_of_scikit_learn():
    draws = np.random.default_rng()
    kinds, experts = draws.integers(3, size=50), draws.integers(4, size=50)
    weights = np.eye(4)[experts]
    found = summarise({0: weights}, kinds.tolist())[0]
    assert found.information == pytest.approx(mutual_info_score(kinds, experts))
    assert found.entropy == 0


def test_information_of_soft_routing_is_the_sum_over_kinds_and_experts():
    draws = np.random.default_rng()
    weights, kinds = weights_of(draws, 40), draws.integers(3, size=40).tolist()
    expected = 0.0
    for kind, expert in itertools.product(sorted(set(kinds)), range(4)):
        joint = sum(row[expert] for row, of in zip(weights, kinds, strict=True) if of == kind) / 40
        expected += joint * np.log(joint / (kinds.count(kind) / 40) / weights[:, expert].mean())
    assert specialisation(weights, kinds, permutations=10).information == pytest.approx(expected)


def test_planted_specialists_are_found_and_none_where_there_are_none():
    draws = np.random.default_rng(1)
    kinds = ["box", "caption"] * 30
    planted = np.array([[0.9, 0.1] if kind == "box" else [0.1, 0.9] for kind in kinds])
    found = specialisation(planted, kinds)
    binary = entropy([0.9, 0.1])
    assert found.information == pytest.approx(np.log(2) - binary)
    assert found.most == pytest.approx(np.log(2))
    assert found.p_value == pytest.approx(1 / 1001)
    none = [specialisation(weights_of(draws, 60), kinds, permutations=199, seed=i).p_value for i in range(20)]
    assert np.mean(np.array(none) <= 0.2) < 0.5  # uniform p-values: 4 of 20 expected; 10 has a chance of 0.002
    assert specialisation(np.full((60, 2), 0.5), kinds, permutations=19).p_value == 1


def _pairs(rows):
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.array([units[i] @ units[j] for i, j in itertools.combinations(range(len(rows)), 2)])


def test_correlation_is_that_of_scipy_over_all_pairs():
    draws = np.random.default_rng()
    contexts, weights = draws.normal(size=(25, 6)), {2: weights_of(draws, 25), 1: weights_of(draws, 25)}
    found = correlate(contexts, weights, resamples=20)
    joined = np.concatenate([weights[1], weights[2]], axis=1)
    assert found.r == pytest.approx(pearsonr(_pairs(contexts), _pairs(joined)).statistic, abs=1e-10)
    assert (found.samples, found.pairs) == (25, 300)
    x, y = pair_similarities(contexts, weights)
    np.testing.assert_allclose(x, _pairs(contexts), rtol=1e-9)
    np.testing.assert_allclose(y, _pairs(joined), rtol=1e-9)


def test_correlation_of_drawn_samples_leaves_out_pairs_of_a_sample_with_itself():
    """One resample by hand: repeated samples, as the bootstrap draws them."""
    from covft.analysis.stats.routing import _cosines, _weighted_r

    draws = np.random.default_rng()
    one, other = draws.normal(size=(9, 3)), draws.normal(size=(9, 3))
    drawn = draws.integers(9, size=9)
    pairs = [(i, j) for i, j in itertools.product(drawn, repeat=2) if i != j]
    x, y = (cosines - cosines.mean() for cosines in (_cosines(one), _cosines(other)))
    expected = pearsonr([x[i, j] for i, j in pairs], [y[i, j] for i, j in pairs]).statistic
    counts = np.bincount(drawn, minlength=9)[None].astype(float)
    assert _weighted_r([np.ones_like(x), x, y, x * y, x * x, y * y], counts)[0] == pytest.approx(expected, abs=1e-9)


def test_a_planted_correlation_is_inside_its_interval_and_none_is_found_without():
    draws = np.random.default_rng(4)
    weights = weights_of(draws, 80)
    follows = correlate(weights + 0.02 * draws.normal(size=weights.shape), {0: weights}, resamples=200)
    assert 0.8 < follows.low < follows.r < follows.high <= 1
    apart = correlate(draws.normal(size=(80, 6)), {0: weights}, resamples=200)
    assert apart.low < 0 < apart.high
    assert apart.high - apart.low < 0.3


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: summarise({0: [[0.5, 0.9]]}), ShapeError),
        (lambda: summarise({0: [[0.5, 0.5]]}, ["a", "b"]), ShapeError),
        (lambda: specialisation([[0.5, 0.5]] * 2, ["a", "a"]), ConfigError),
        (lambda: specialisation([[0.5, 0.5]] * 2, ["a", "b"], permutations=0), ConfigError),
        (lambda: correlate(np.eye(4), {0: [[0.5, 0.5]] * 3}), ShapeError),
        (lambda: correlate(np.eye(4), {0: [[0.5, 0.5]] * 4}), ConfigError),
        (lambda: correlate(np.eye(4), {0: [[0.5, 0.5]] * 4}, level=1.0), ConfigError),
    ],
)
def test_what_cannot_be_counted_is_refused(call, error):
    with pytest.raises(error, match="Expected"):
        call()
