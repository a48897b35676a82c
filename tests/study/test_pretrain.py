"""Pretraining of both networks, for a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from study.data.scenes import make_scenes
from study.data.tasks import TASKS
from study.data.word_pictures import SIDE
from study.llava import build_llava
from study.pretrain import PretrainSettings, pretrain_language_model, pretrain_vit, training_word_pictures, web_caption
from study.probe import measure_language_model
from study.towers import small_vit
from study.weights import save_weights


def test_captions_of_the_web_omit_things_and_places() -> None:
    rng = np.random.default_rng(0)
    for scene in make_scenes("train", 30):
        complete = web_caption(scene, (1, 1, 1, 1, 1), rng).split(" , ")
        assert sorted(complete) == sorted(f"{thing.size} {thing.name}" for thing in scene.things)
        kinds = web_caption(scene, (1, 0, 0, 0, 0), rng).split(" , ")
        assert sorted(kinds) == sorted(thing.reference for thing in scene.things)
        assert web_caption(scene, (0, 1, 1, 1, 1), rng) == "the picture"


def test_each_scene_comes_with_different_questions() -> None:
    scenes = make_scenes("train", 6)
    data = training_word_pictures(scenes, 2)
    assert len(data) == 12
    assert (data.bags_RPW[:6] == data.bags_RPW[6:]).all()
    assert not (data.ids_RL[:6] == data.ids_RL[6:]).all()
    assert data.bags_RPW.shape[1] == SIDE * SIDE


@pytest.mark.long
def test_a_few_steps_lower_the_losses_and_the_weights_load(tmp_path: Path) -> None:
    settings = PretrainSettings(
        scenes=48, vit_steps=40, vit_batch=24, captions=1, lm_steps=40, lm_batch=12, questions=1, sides=(6, 3)
    )
    losses: dict[str, list[float]] = {"vit": [], "lm": []}
    vit = pretrain_vit(settings, lambda step, loss: losses["vit"].append(loss))
    model = pretrain_language_model(settings, lambda step, loss: losses["lm"].append(loss))
    for found in losses.values():
        assert found[-1] < found[0]
    scores = measure_language_model(model, scenes=12)
    means = {f"word_pictures_mean_{tokens}_tokens" for tokens in (36, 9, 4)}
    assert scores.keys() == {f"word_pictures_{task}" for task in TASKS} | means
    tasks = [share for name, share in scores.items() if name not in means]
    assert scores["word_pictures_mean_36_tokens"] == pytest.approx(sum(tasks) / len(tasks), abs=1e-3)
    save_weights(tmp_path, "small_vit", vit, {}, {})
    save_weights(tmp_path, "language_model", model, {}, scores)
    llava = build_llava(small_vit(tmp_path), tmp_path)
    loaded = llava.model.language_model.state_dict()
    for name, value in model.model.state_dict().items():
        assert (loaded[name] == value.half().float()).all()
