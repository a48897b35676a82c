"""Complete runs, from settings to rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from study.data.tasks import TASKS
from study.runs.captions import with_captions
from study.runs.plan import STUDIES, Planned, plan
from study.runs.rows import Rows
from study.runs.score import mean_of
from study.runs.search import choose_rates, grid
from study.runs.settings import CONTROLS, RunSettings
from study.runs.tables import chosen, held_out_part
from study.runs.work import work

TINY: dict[str, Any] = {
    "steps": 3, "first_steps": 1, "train_scenes": 24, "held_out_scenes": 24, "held_out_questions": 4, "batch": 8,
    "text_encoder": "bag_of_words",
}  # fmt: skip


def test_plans_have_each_run_once_the_longest_first() -> None:
    planned = plan(STUDIES, (0, 1), steps=400)
    names = [one.run.name for one in planned]
    assert len(set(names)) == len(names)
    assert planned == sorted(planned, key=lambda one: -one.cost)
    assert {study for one in planned for study in one.studies} == set(STUDIES)
    assert len({one.run.label for one in planned}) * 2 == len(planned)
    of_controls = {one.run.control for one in planned if "controls" in one.studies and one.run.method == "covft"}
    assert of_controls == set(CONTROLS)
    (covft,) = (one for one in planned if one.run == RunSettings(steps=400))
    assert {"methods", "controls", "context", "experts", "tokens", "fraction"} <= set(covft.studies)
    backbone = next(one for one in planned if one.run.tower == "backbone")
    assert planned.index(backbone) == 0
    half = next(one.run for one in planned if one.run.fraction == 0.5)
    assert half.steps == 200
    assert plan(["methods"], [0], ["lora"])[0].run.method == "lora"


def test_a_search_is_the_same_for_every_method_and_its_best_rates_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = grid(("lora", "frozen", "covft"), {"vision_lr": [1e-4, 1e-3]}, (0,))
    assert {one.run.split for one in planned} == {"validation"}
    rates = {
        name: sorted(o.run.vision_lr or 0 for o in planned if o.run.method == name) for name in ("covft", "frozen")
    }
    assert rates == {"covft": [1e-4, 1e-3], "frozen": [0]}
    rows = Rows(tmp_path / "rows")
    for one, score in zip(planned, range(len(planned)), strict=True):
        rows.write({
            "name": one.run.name, "split": "validation", "settings": one.run.to_dict(), "scores": {"count": score},
        })  # fmt: skip
    others = ({"method": "lora", "options": {"r": 750, "alpha": 1500.0}}, {"method": "covft", "steps": 50})
    for fields in others:  # not what is compared: they say nothing about the rate of the method
        run = planned[0].run.replace(**fields, vision_lr=1e-5)
        rows.write({
            "name": run.name, "split": "validation", "settings": run.to_dict(), "scores": {"count": len(planned)},
        })  # fmt: skip
    best = {name: max((i, o.run.vision_lr) for i, o in enumerate(planned) if o.run.method == name)[1]
            for name in ("covft",)}  # fmt: skip
    path = tmp_path / "rates.json"
    path.write_text('{"small": {"vision_lr": {"default": 0.5}}, "large": {"vision_lr": {"default": 0.25}}}')
    monkeypatch.setattr("study.runs.settings.RATES", path)
    monkeypatch.setattr("study.runs.search.RATES", path)
    chosen_now = choose_rates(rows, "small")
    assert chosen_now["covft"] == best["covft"]
    assert min(chosen_now.values()) > 1e-5
    kept = json.loads(path.read_text())
    assert kept["small"]["vision_lr"] == {"default": 0.5, **chosen_now}
    assert kept["large"] == {"vision_lr": {"default": 0.25}}


def test_captions_are_scored_from_what_was_found() -> None:
    settings = RunSettings(**TINY)
    answers = [example.answer for example in chosen(held_out_part(settings), ("caption",))]
    found = {"hits": {"count": [1.0, 0.0]}, "captions": {"caption": [answers[0], *["blank"] * (len(answers) - 1)]}}
    row = with_captions({"settings": settings.to_dict(), "found": {"": found}})
    assert "found" not in row
    assert row["hits"]["count"] == "10"
    assert row["hits"]["caption"][0] > 1
    assert row["hits"]["caption"][1:] == [0.0] * (len(answers) - 1)
    assert row["scores"]["count"] == 50


@pytest.mark.long
def test_runs_leave_rows_and_are_not_run_again(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    downstream: dict[str, Any] = {"tasks": ("count", "relation"), "upstream": ("existence", "word")}
    runs = [
        RunSettings(**TINY, method="frozen"),
        RunSettings(**TINY, control="shuffled"),
        RunSettings(**TINY, method="frozen", language="lora", projector=False, **downstream),
    ]
    planned = [Planned(run, ("methods",)) for run in runs]
    outcome = work(planned, rows, jobs=2, show=False)
    assert outcome.failed == {}
    assert sorted(outcome.finished) == sorted(run.name for run in runs)
    found = {row["name"]: row for row in rows.read()}
    frozen, shuffled, forgetting = (found[run.name] for run in runs)
    assert set(frozen["scores"]) == set(frozen["hits"]) == set(frozen["floors"]["no_image"]) == set(TASKS)
    assert frozen["trained"]["tower"] == 0
    assert shuffled["trained"]["tower"] > 0
    assert set(forgetting["scores"]) == set(forgetting["before"]) == {"count", "relation", "existence", "word"}
    again = work([*planned, Planned(runs[0], ("controls",))], rows, jobs=1, show=False)
    assert (again.finished, again.left) == ([], [])
    assert {row["name"]: row for row in rows.read()}[runs[0].name]["studies"] == ["methods", "controls"]
    late = work([Planned(RunSettings(**TINY, seed=1), ("methods",))], rows, time_limit=0.0, show=False)
    assert late.left == [RunSettings(**TINY, seed=1).name]


def test_the_mean_of_a_run_leaves_out_the_conflict():
    assert mean_of({"count": 90.0, "word": 10.0, "grounding": 0.0, "caption": 350.0}) == 50.0
    assert mean_of({"caption": 350.0}) == 350.0
