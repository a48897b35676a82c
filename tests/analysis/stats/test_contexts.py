"""Components, clusters and similarities agree with scikit-learn and with loops over pairs, on planted clusters."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from covft.analysis.stats.contexts import cluster, project, similarity
from covft.errors import ConfigError, ShapeError


def planted(seed, count=40, width=12, apart=8.0, clusters=3):
    """Vectors around some centres, and the centre of each."""
    draws = np.random.default_rng(seed)
    centres = draws.normal(size=(clusters, width)) * apart
    labels = np.arange(count) % clusters
    return centres[labels] + draws.normal(size=(count, width)), labels


def test_projection_is_that_of_a_singular_value_decomposition():
    vectors, _ = planted(np.random.SeedSequence().entropy)
    found = project(vectors, dims=3)
    centred = vectors - vectors.mean(axis=0)
    u, values, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.explained, (values**2 / (values**2).sum())[:3], rtol=1e-8)
    np.testing.assert_allclose(np.abs(found.points), np.abs(u[:, :3] * values[:3]), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(np.abs(found.components), np.abs(vt[:3]), rtol=1e-6, atol=1e-8)


def test_equal_vectors_have_no_direction():
    assert not project(np.ones((4, 3))).points.any()


def test_planted_clusters_are_found_and_counted():
    vectors, labels = planted(seed=3)
    found = cluster(vectors)
    assert len(found.centroids) == 3
    assert adjusted_rand_score(labels, found.labels) == 1
    assert sorted(found.sizes) == [13, 13, 14]
    assert found.silhouette == pytest.approx(silhouette_score(vectors, labels), abs=1e-9)
    for number, close in enumerate(found.nearest):
        members = [i for i in range(40) if found.labels[i] == number]
        mean = vectors[members].mean(axis=0)
        np.testing.assert_allclose(found.centroids[number], mean, rtol=1e-9)
        by_distance = sorted(members, key=lambda i: np.linalg.norm(vectors[i] - mean))
        assert list(close) == by_distance[:4]


def test_one_cloud_has_a_low_silhouette():
    vectors, _ = planted(seed=3, clusters=1, count=60)
    assert cluster(vectors).silhouette < 0.25
    assert cluster(vectors, 5).sizes != [60]


def test_similarity_is_the_mean_over_pairs():
    draws = np.random.default_rng()
    vectors, labels = draws.normal(size=(17, 5)), [*"aabbbcccc" * 1, *"bbbccc", "alone", None]
    within, between, by_label = [], [], {}
    for i, j in itertools.combinations(range(16), 2):
        cosine = vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
        (within if labels[i] == labels[j] else between).append(cosine)
        if labels[i] == labels[j]:
            by_label.setdefault(labels[i], []).append(cosine)
    found = similarity(vectors, labels)
    assert found.within == pytest.approx(np.mean(within), abs=1e-12)
    assert found.between == pytest.approx(np.mean(between), abs=1e-12)
    assert found.by_label == pytest.approx({label: np.mean(cosines) for label, cosines in by_label.items()}, abs=1e-12)


def test_similarity_without_pairs():
    found = similarity([[1.0, 2.0]], ["a"])
    assert (found.within, found.between, found.by_label) == (None, None, {})


@pytest.mark.long
def test_memory_of_distances_does_not_grow_with_the_square():
    """4,000 samples have 128 MB of distances; 64 MB of them are held at once, and sums of unit vectors instead."""
    vectors = np.random.default_rng(0).normal(size=(4000, 8))

    def peak(function):
        tracemalloc.start()
        function()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(lambda: similarity(vectors, [i % 3 for i in range(4000)])) < 8e6
    assert peak(lambda: cluster(vectors, 2)) < 100e6


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: project(np.ones((3, 2)), dims=3), ConfigError),
        (lambda: project([[1.0, np.nan], [1, 2]]), ShapeError),
        (lambda: project(np.ones(3)), ShapeError),
        (lambda: cluster(np.ones((5, 2))), ConfigError),
        (lambda: cluster(np.eye(4), 4), ConfigError),
        (lambda: similarity(np.eye(4), ["a"]), ShapeError),
    ],
)
def test_what_cannot_be_counted_is_refused(call, error):
    with pytest.raises(error, match="Expected"):
        call()
