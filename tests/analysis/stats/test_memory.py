"""Contexts are analysed in memory that grows with the samples, not with their pairs."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from covft.analysis.stats import cluster, correlate, pair_similarities, project, similarity, specialisation

WIDTH, SMALL, LARGE = 16, 4000, 8000
MEGABYTE = 2**20

pytestmark = pytest.mark.long


def peak(function, count):
    draws = np.random.default_rng(0)
    contexts = draws.normal(size=(count, WIDTH)).astype(np.float32)
    weights = {layer: draws.dirichlet(np.ones(4), size=count) for layer in range(2)}
    kinds = [f"kind {number % 5}" for number in range(count)]
    function(contexts[:50], {layer: rows[:50] for layer, rows in weights.items()}, kinds[:50])  # imports its libraries
    tracemalloc.start()
    function(contexts, weights, kinds)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.parametrize(
    ("function", "beside"),
    [
        (lambda contexts, weights, kinds: project(contexts), 0),
        (lambda contexts, weights, kinds: cluster(contexts, 3), 1),
        (lambda contexts, weights, kinds: similarity(contexts, kinds), 0),
        (lambda contexts, weights, kinds: specialisation(weights[0], kinds, permutations=10), 0),
        (lambda contexts, weights, kinds: correlate(contexts, weights, resamples=10), 0),
        (lambda contexts, weights, kinds: pair_similarities(contexts, weights), 0),
    ],
    ids=["project", "cluster", "similarity", "specialisation", "correlate", "pair_similarities"],
)
def test_memory_grows_with_the_samples(function, beside):
    """By a few copies in float64; k-means has distances in blocks of 64 MB, which are full at both sizes."""
    copies = 6 * (LARGE - SMALL) * (WIDTH + 8) * 8
    grown = peak(function, LARGE) - peak(function, SMALL)
    assert grown < copies + beside * 8 * MEGABYTE
    assert copies + beside * 8 * MEGABYTE < (LARGE**2 - SMALL**2) * 8 / 20, "a matrix of pairs would be seen"
