"""The agreement of a planted diagnosis with planted rows."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from covft.errors import CheckpointError
from study.inspection.agreement import (
    ALL,
    agreements,
    borne_out,
    gains_of,
    path_of,
    predictions,
    read_diagnosis,
    tables,
)
from study.results.load import read_rows
from study.results.studies import Results
from tests.helpers.study_rows import TWELVE, percents, planted, write


def diagnosis(conflict):
    """Kinds whose gradients share as much as given by task: 0 is none in common with the others, 1 all."""
    tasks = list(TWELVE)
    own = np.array([conflict[task] for task in tasks])
    cosines = np.outer(own, own)
    np.fill_diagonal(cosines, 1.0)
    alone = {one: {other: {"mean": 1 - conflict[other]} for other in tasks} for one in tasks}
    alignment = cosines.tolist()
    alignment[0][1] = alignment[1][0] = None
    return {
        "kinds": dict.fromkeys(tasks, 40),
        "conflict": {"kinds": tasks, "cosines": [cosines.tolist()] * 2, "alignment": [alignment] * 2},
        "probe": {"alone": alone},
        "verdict": {"choice": "context", "words": "Tune the tower with context routing."},
    }


@pytest.fixture
def world(tmp_path):
    """Covft gains most where tasks share least; in points, 5 more from task to task."""
    more = {task: 5.0 * place for place, task in enumerate(TWELVE)}
    rows = [
        *planted("frozen", percents(10), ["methods"], method="frozen"),
        *planted("full", percents(20), ["methods"], method="full", noise=0),
        *planted("covft", {task: 20 + more[task] for task in TWELVE}, ["methods"], noise=0),
    ]
    results = Results.of("small", read_rows(write(rows, tmp_path / "rows")))
    found = diagnosis({task: 1 - place / 12 for place, task in enumerate(TWELVE)})
    path_of(ALL, tmp_path).write_text(json.dumps(found))
    return results, tmp_path


def test_gains_are_those_of_the_rows(world):
    gains = gains_of(world[0])
    assert {task: round(gain.value) for task, gain in gains.items()} == {t: 5 * n for n, t in enumerate(TWELVE)}
    assert gains_of(Results.of("small", [])) == {}


def test_predictors_are_means_over_the_other_tasks(world):
    found = read_diagnosis(ALL, world[1])
    predicted = predictions(found)
    matrix = np.array(found["conflict"]["cosines"][-1])
    for place, task in enumerate(TWELVE):
        others = [other for other in range(12) if other != place]
        known = [other for other in others if {place, other} != {0, 1}]
        assert predicted["alignment"][task] == pytest.approx(matrix[place, known].mean())
        assert predicted["separation"][task] == pytest.approx(1 - matrix[place, others].mean())
        assert predicted["harm"][task] == pytest.approx(place / 12)


def test_a_planted_agreement_is_found_and_none_is_not(world):
    found = agreements(predictions(read_diagnosis(ALL, world[1])), {t: g.value for t, g in gains_of(world[0]).items()})
    assert found["separation"].rho == pytest.approx(1)
    assert found["harm"].rho == pytest.approx(1)
    assert found["alignment"].rho < -0.9
    assert all(one.p < 0.001 for one in found.values())
    draws = np.random.default_rng(0)
    by_chance = agreements(
        {"x": dict(zip(TWELVE, draws.random(12), strict=True))}, dict(zip(TWELVE, range(12), strict=True))
    )
    assert by_chance["x"].p > 0.05


def test_the_p_value_is_the_share_of_all_orders():
    x, y = [1.0, 2.0, 2.0, 4.0, 5.0], [0.3, 0.1, 0.5, 0.4, 0.9]
    ranks = {1.0: 0, 2.0: 1.5, 4.0: 3, 5.0: 4}
    a, b = np.array([ranks[value] for value in x]), np.argsort(np.argsort(y)).astype(float)
    rho = np.corrcoef(a, b)[0, 1]
    orders = [np.corrcoef(a, order)[0, 1] for order in itertools.permutations(b)]
    found = agreements({"x": dict(enumerate(x))}, dict(enumerate(y)))["x"]
    assert found.rho == pytest.approx(rho)
    assert found.p == pytest.approx(np.mean(np.abs(orders) >= abs(rho) - 1e-9), abs=0.02)


def test_tables_say_which_method_was_indicated(world):
    verdict, agreed, tasks = tables(*world)
    assert verdict.rows[-1][:2] == ["context", "covft"]
    assert (len(verdict.rows) - 1, 0) in verdict.strong
    assert [row[0] for row in agreed.rows] == ["alignment", "separation", "harm"]
    assert [row[0] for row in tasks.rows] == [f"`{task}`" for task in reversed(TWELVE)]
    found = read_diagnosis(ALL, world[1])
    assert "is borne out" in borne_out(world[0], found)
    found["verdict"]["choice"] = "freeze"
    assert "not borne out" in borne_out(world[0], found)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*python -m study diagnose"):
        tables(world[0], world[1] / "rows")
