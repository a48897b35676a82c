import io

import numpy as np
import pytest
import torch

from covft.analysis.diagnosis.probe import Change, Probe
from covft.analysis.plots.conflict import plot_distance, plot_dominance, plot_layers, plot_pairs, plot_probe
from covft.analysis.stats.conflict import conflict, dominance
from covft.analysis.stats.distance import parameter_distance
from covft.analysis.stats.gradients import Gradients
from covft.errors import ConfigError


@pytest.fixture
def gradients():
    draws = np.random.default_rng(0)
    return Gradients((3, 4), draws.normal(size=(9, 2, 8)).astype(np.float32), ("a", "b", "c") * 3)


def drawn(figure):
    figure.savefig(io.BytesIO(), format="svg")
    [axes] = figure.axes
    return axes


@pytest.mark.long
def test_conflict_is_drawn_with_its_numbers(gradients):
    found = conflict(gradients, resamples=20, permutations=19)
    axes = drawn(plot_layers(found))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a | b", "a | c", "b | c"]
    written = [text.get_text() for text in drawn(plot_pairs(found, 4)).texts]
    assert written == [f"{value:+.3f}" for value in found.cosines[1].ravel()]
    assert drawn(plot_pairs(found)).texts[0].get_text() == f"{found.cosines[2, 0, 0]:+.3f}"
    with pytest.raises(ConfigError, match="layer=9 is not"):
        plot_pairs(found, 9)


def test_dominance_is_drawn_as_counts_of_updates(gradients):
    one = dominance(gradients)
    axes = drawn(plot_dominance({"full": one}))
    assert sum(bar.get_height() for bar in axes.patches) == 9
    assert axes.get_legend().get_texts()[0].get_text() == f"full: {one.mean.mean:.3f} ± {one.std:.3f}"


def test_distance_is_drawn_by_block():
    towers = [torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)) for _ in range(2)]
    found = parameter_distance(*towers)
    axes = drawn(plot_distance([found, found]))
    assert list(axes.lines[1].get_ydata()) == [found.blocks["0"].relative, found.blocks["1"].relative]


def test_probe_is_drawn_with_all_trainings():
    def change(mean):
        return Change(mean, mean - 0.1, mean + 0.1)

    alone = {"a": {"a": change(-0.2), "b": change(0.3)}, "b": {"a": change(0.1), "b": change(-0.4)}}
    found = Probe(
        {"a": 1.0, "b": 2.0}, alone, {"a": change(-0.1), "b": change(-0.05)}, change(0.1), change(0.9), {}, 1e-4, 2, 4
    )
    axes = drawn(plot_probe(found))
    assert [text.get_text() for text in axes.texts][:3] == ["-0.2000", "+0.3000", "+0.1000"]
    assert [text.get_text() for text in axes.get_yticklabels()][-1] == "trained on all"
