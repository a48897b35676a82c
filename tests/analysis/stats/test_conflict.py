import itertools

import numpy as np
import pytest

from covft.analysis.stats.conflict import conflict, dominance
from covft.analysis.stats.gradients import Gradients
from covft.errors import ConfigError, LayerIndexError, ShapeError
from covft.metrics import holm

WIDTH = 64


def planted(angle, counts=(40, 40), noise=2.0, seed=0, layers=2):
    """Gradients of two kinds with a known angle between their directions, in the first block; one in the others."""
    draws = np.random.default_rng(seed)
    first, other = np.linalg.qr(draws.normal(size=(WIDTH, 2)))[0].T
    second = np.cos(angle) * first + np.sin(angle) * other
    kinds = tuple("a" if i < counts[0] else "b" for i in range(sum(counts)))
    vectors = draws.normal(size=(len(kinds), layers, WIDTH)) * noise / np.sqrt(WIDTH)
    for row, kind in enumerate(kinds):
        vectors[row, 0] += first if kind == "a" else second
        vectors[row, 1:] += first
    vectors *= draws.uniform(0.1, 10, size=(len(kinds), 1, 1))  # cosines know no length
    return Gradients(tuple(range(3, 3 + layers)), vectors.astype(np.float32), kinds)


def cosine(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def naive_mean(vectors, kinds, one, other):
    """Mean cosine of pairs of different samples, one pair at a time."""
    pairs = itertools.permutations(range(len(kinds)), 2)
    return np.mean([cosine(vectors[i], vectors[j]) for i, j in pairs if (kinds[i], kinds[j]) == (one, other)])


def test_cosines_alignment_and_separation_are_those_of_pairs_one_by_one():
    gradients = planted(1.0, counts=(7, 5))
    found = conflict(gradients, resamples=50, permutations=50)
    for position in range(2):
        vectors = gradients.vectors[:, position]
        naive = np.array([[naive_mean(vectors, gradients.kinds, one, other) for other in "ab"] for one in "ab"])
        np.testing.assert_allclose(found.cosines[position], naive, rtol=1e-6, atol=1e-9)
        aligned = np.clip(naive / np.sqrt(np.outer(naive.diagonal(), naive.diagonal())), -1, 1)
        np.testing.assert_allclose(found.alignment[position], aligned, rtol=1e-6)
        assert found.separation[position] == pytest.approx((naive[0, 0] + naive[1, 1]) / 2 - naive[0, 1], rel=1e-6)
    np.testing.assert_allclose(found.cosines[-1], found.cosines[:2].mean(0))
    assert (found.kinds, found.counts, found.layers) == (("a", "b"), (7, 5), (3, 4))


@pytest.mark.parametrize("degrees", [0, 60, 90, 150])
def test_a_conflict_of_a_known_angle_is_found(degrees):
    found = conflict(planted(np.radians(degrees)), resamples=300, permutations=199)
    truth = np.cos(np.radians(degrees))
    assert found.alignment[0, 0, 1] == pytest.approx(truth, abs=0.15)
    assert found.low[0, 0, 1] - 1e-9 <= truth <= found.high[0, 0, 1] + 1e-9
    assert found.alignment[1, 0, 1] > 0.85, "no conflict was planted there"
    assert found.p_values[1] > 0.05
    if degrees:
        assert found.p_value == found.pair_p_values[0, 1] == found.p_values[0] / 2 == 1 / 200
    else:
        assert found.p_value > 0.05


def test_intervals_hold_the_angle_as_often_as_they_say():
    truth, held = np.cos(np.radians(70)), []
    for seed in range(40):
        found = conflict(planted(np.radians(70), (25, 25), seed=seed, layers=1), resamples=150, permutations=1)
        held.append(found.low[0, 0, 1] <= truth <= found.high[0, 0, 1])
    assert np.mean(held) > 0.8  # of 40 at 95 %, fewer than 33 are less likely than one in 1,000


def test_p_values_of_halves_of_one_kind_are_uniform():
    p_values = np.array(
        [conflict(planted(0.0, (6, 8), seed=seed), resamples=1, permutations=49).p_value for seed in range(60)]
    )
    for share in (0.1, 0.3, 0.5, 0.8):
        assert (p_values <= share).mean() == pytest.approx(share, abs=0.2)


def test_p_value_is_the_share_of_all_orders():
    gradients = planted(np.radians(50), counts=(4, 3), noise=3, layers=1)
    vectors = gradients.vectors[:, 0]

    def separation(kinds):
        cosines = {pair: naive_mean(vectors, kinds, *pair) for pair in (("a", "a"), ("b", "b"), ("a", "b"))}
        return (cosines["a", "a"] + cosines["b", "b"]) / 2 - cosines["a", "b"]

    chosen = itertools.combinations(range(7), 4)
    orders = [separation(["a" if i in chosen_as_a else "b" for i in range(7)]) for chosen_as_a in chosen]
    exact = np.mean(np.array(orders) >= separation(gradients.kinds) - 1e-9)
    assert conflict(gradients, resamples=1, permutations=4000).p_value == pytest.approx(exact, abs=0.03)


def test_p_values_of_blocks_and_pairs_are_adjusted():
    draws = np.random.default_rng(0)
    kinds = tuple("abc"[i % 3] for i in range(30))
    vectors = draws.normal(size=(30, 3, WIDTH)).astype(np.float32)
    vectors[[kind == "c" for kind in kinds]] += 0.5
    found = conflict(Gradients((0, 1, 2), vectors, kinds), resamples=10, permutations=99)
    alone = [conflict(Gradients((n,), vectors[:, n : n + 1], kinds), resamples=10, permutations=99) for n in range(3)]
    np.testing.assert_allclose(found.p_values[:-1], holm([one.p_value for one in alone]))
    assert found.pair_p_values[0, 1] > 0.05 > found.pair_p_values[1, 2]
    np.testing.assert_array_equal(found.pair_p_values, found.pair_p_values.T)
    assert list(found.pairs()) == [(0, 1), (0, 2), (1, 2)]


def test_kinds_without_a_direction_have_no_alignment():
    vectors = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)[:, None]
    found = conflict(Gradients((0,), vectors, ("a", "b", "a", "b") * 2), resamples=20, permutations=9)
    assert np.isnan(found.alignment[0]).all()
    assert np.isnan(found.low[0]).all()


def test_dominant_direction_is_the_first_of_a_singular_value_decomposition():
    gradients = planted(1.0, counts=(9, 6))
    for layer in (None, 4):
        rows = gradients.vectors.reshape(15, -1) if layer is None else gradients.vectors[:, 1]
        _, values, directions = np.linalg.svd(rows.astype(np.float64))
        naive = np.array([cosine(row, directions[0]) for row in rows])
        naive *= np.sign(naive.sum())
        found = dominance(gradients, layer)
        np.testing.assert_allclose(found.cosines, naive, rtol=1e-5, atol=1e-7)
        assert found.mean.mean == pytest.approx(naive.mean(), rel=1e-5)
        assert found.std == pytest.approx(naive.std(ddof=1))
        assert found.explained == pytest.approx(values[0] ** 2 / (values**2).sum())
        assert found.mean.low < found.mean.mean < found.mean.high


def test_updates_without_a_common_direction_have_the_stated_cosines():
    vectors = np.random.default_rng(0).normal(size=(50, 1, 20_000)).astype(np.float32)
    found = dominance(Gradients((0,), vectors, ("a",) * 50))
    assert np.sqrt((found.cosines**2).mean()) == pytest.approx(found.chance, rel=0.2)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ShapeError, match="1 of 'b'"):
        conflict(planted(0.0, counts=(5, 1)))
    with pytest.raises(ShapeError, match="only 'a'"):
        conflict(planted(0.0, counts=(5, 0)))
    with pytest.raises(ConfigError, match="permutations=0"):
        conflict(planted(0.0), permutations=0)
    with pytest.raises(ConfigError, match="level=1"):
        conflict(planted(0.0), level=1.0)
    with pytest.raises(LayerIndexError, match="Block 9"):
        dominance(planted(0.0), 9)
    with pytest.raises(ShapeError, match="Updates of zero"):
        dominance(Gradients((0,), np.zeros((3, 1, 4), np.float32), ("a",) * 3))
    with pytest.raises(ShapeError, match="not projected gradients"):
        Gradients((0,), np.full((1, 1, 4), np.nan, np.float32), ("a",))
