"""What is kept of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from study.data.tasks import TASKS, Example
from study.demo.inspection import Inspector, examples_shown, flattened
from study.runs.run import run
from study.runs.settings import RunSettings
from study.runs.tables import chosen, held_out_part

TINY: dict[str, Any] = {
    "steps": 3, "first_steps": 1, "train_scenes": 24, "held_out_scenes": 24, "held_out_questions": 4, "batch": 8,
    "text_encoder": "bag_of_words", "tasks": ("existence", "count", "grounding", "caption"),
}  # fmt: skip


def test_the_conflict_comes_first_in_each_of_the_first_scenes() -> None:
    tasks = ("count", "word", "caption", "photo", "grounding", "size")
    examples = [Example(task, scene, "", "", "") for scene in range(12) for task in tasks]
    shown = [examples[row] for row in examples_shown(examples)]
    assert [e.scene for e in shown] == sorted([*range(8)] * 4)
    assert [e.task for e in shown[:4]] == ["caption", "grounding", "count", "word"]


def test_two_dimensions_are_the_principal_components() -> None:
    rng = np.random.default_rng()
    vectors = rng.normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1]
    points, share = flattened(vectors)
    pca = PCA(2).fit(vectors)
    np.testing.assert_allclose(np.abs(points), np.abs(pca.transform(vectors)), atol=1e-9)
    assert share == pytest.approx(pca.explained_variance_ratio_.sum())


@pytest.mark.long
def test_answers_routing_and_the_saved_encoder_join_the_row_of_covft(tmp_path: Path) -> None:
    settings = RunSettings(**TINY)
    row = run(settings, inspect=Inspector(tmp_path))
    kept = row["inspection"]
    examples = chosen(held_out_part(settings), settings.tasks)
    shown = examples_shown(examples)
    of_count = [place for place, row in enumerate(shown) if examples[row].task == "count"]
    asked = [i for i, example in enumerate(examples) if example.task == "count"]
    # the answers that are kept are those that were scored
    for place in of_count:
        hit = row["hits"]["count"][asked.index(shown[place])]
        assert (kept["answers"][place] == examples[shown[place]].answer) == (hit == "1")
    assert of_count
    assert list(kept["weights"]) == list(kept["contexts"]) == ["2", "3", "4"]
    for layer, by_task in kept["weights"].items():
        assert set(by_task) == set(settings.tasks) <= set(TASKS)
        for task, weights in by_task.items():
            assert sum(weights) == pytest.approx(1, abs=1e-3)
            assert len(kept["contexts"][layer]["points"][task]) == sum(e.task == task for e in examples)
    assert kept["saved"]["loaded"] < 1e-5 < kept["saved"]["pretrained"]
    assert (tmp_path / "encoder" / "model.safetensors").is_file()


@pytest.mark.long
def test_of_other_methods_only_answers_are_kept(tmp_path: Path) -> None:
    row = run(RunSettings(**TINY, method="frozen"), inspect=Inspector(tmp_path))
    assert set(row["inspection"]) == {"answers"}
    assert not list(tmp_path.iterdir())
