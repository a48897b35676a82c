"""Figures show the numbers that they are given, and nothing global changes."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from covft.analysis.plots.attention import plot_attention, plot_questions
from covft.analysis.plots.contexts import plot_contexts
from covft.analysis.plots.routing import plot_correlation, plot_routing
from covft.analysis.stats.attention import AttentionMaps, QuestionMaps
from covft.analysis.stats.contexts import cluster, project
from covft.analysis.stats.routing import correlate, summarise
from covft.errors import LayerIndexError, ShapeError

DRAWS = np.random.default_rng(0)
VECTORS = DRAWS.normal(size=(24, 6)) + 9 * (np.arange(24) % 3)[:, None]
KINDS = ["box", "caption", None] * 8
WEIGHTS = {4: DRAWS.dirichlet(np.ones(4), 24), 5: DRAWS.dirichlet(np.ones(4), 24)}
PICTURES = DRAWS.integers(0, 256, size=(24, 8, 8, 3), dtype=np.uint8)


def texts_of(figure):
    """All that is written in a figure."""
    import matplotlib.text

    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def is_drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue().startswith(b"\x89PNG")


def test_scatter_has_every_sample_in_the_colour_of_its_kind():
    projection, clusters = project(VECTORS), cluster(VECTORS, 3)
    figure = plot_contexts(projection, KINDS, clusters=clusters, thumbnails=PICTURES)
    scatter, near = figure.axes
    points = {str(group.get_label()): np.asarray(group.get_offsets()) for group in scatter.collections}
    np.testing.assert_allclose(points["box"], projection.points[::3])
    np.testing.assert_allclose(points["caption"], projection.points[1::3])
    np.testing.assert_allclose(points["no kind"], projection.points[2::3])
    sheet = near.images[0].get_array()
    first = clusters.nearest[0][0]
    assert np.array_equal(sheet[:8, :8], PICTURES[first])
    assert f"silhouette {clusters.silhouette:.2f}" in texts_of(figure)
    assert is_drawn(figure)


def test_heat_maps_show_mean_weights():
    summary = summarise(WEIGHTS, KINDS)
    figure = plot_routing(summary)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    np.testing.assert_allclose(shown[0], [summary[4].load, summary[5].load])
    np.testing.assert_allclose(shown[2], [summary[4].by_kind[1], summary[5].by_kind[1]])
    assert f"{summary[4].load[2]:.2f}" in texts_of(figure)
    assert is_drawn(figure)


def test_correlation_counts_every_pair():
    figure = plot_correlation(VECTORS, WEIGHTS, correlate(VECTORS, WEIGHTS, resamples=20))
    assert figure.axes[0].collections[0].get_array().sum() == 24 * 23 / 2
    assert "r = " in texts_of(figure)


def test_maps_lie_over_the_part_of_the_square_that_the_image_fills():
    maps = {3: np.ones((1, 2, 4)), 4: np.eye(4)[None, :2]}
    figure = plot_attention(AttentionMaps(maps, {}, {}, ("what?",), PICTURES[:1]), [4])
    picture, shown = figure.axes
    assert np.array_equal(picture.images[0].get_array(), PICTURES[0])
    assert np.array_equal(shown.images[1].get_array(), np.eye(4)[:2])
    assert list(shown.images[1].get_extent()) == [-0.5, 7.5, 5.5, 1.5]
    assert is_drawn(figure)
    with pytest.raises(LayerIndexError, match="cannot be drawn"):
        plot_attention(AttentionMaps(maps, {}, {}, ("what?",), PICTURES[:1]), [7])


def test_questions_share_a_scale_and_leave_out_blocks_where_nothing_moves():
    moved = {0: np.zeros((2, 2)), 1: np.full((2, 2), 0.5), 2: np.full((2, 2), 1.5)}
    found = QuestionMaps(("left?", "right?"), moved, {}, {1: np.ones((2, 2, 2))}, PICTURES[0])
    figure = plot_questions(found)
    written = texts_of(figure)
    assert "after block 1" in written
    assert "after block 0" not in written
    assert "left?" in written
    assert "right?" in written
    scales = {axes.images[1].get_clim() for axes in figure.axes if axes.get_title().startswith("after")}
    assert scales == {(0, 1.5)}


def test_nothing_global_changes():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ShapeError, match="drawn together"):
        plot_contexts(project(VECTORS), KINDS[:3])
