"""Which runs the demo has."""

from __future__ import annotations

import pytest

from covft.errors import ConfigError
from study.demo.settings import DemoSettings, label_of
from study.runs.settings import RunSettings


def test_the_runs_differ_in_method_and_control_alone() -> None:
    runs = DemoSettings(fields={"seed": 3, "steps": 7}).runs()
    assert list(runs) == ["frozen", "full", "covft", "covft-shuffled"]
    assert [label_of(run) for run in runs.values()] == ["frozen", "full", "covft", "covft, texts shuffled"]
    same = {
        name: RunSettings(method="covft", control="none").replace(seed=3, steps=7, train_scenes=4000) for name in runs
    }
    for name, run in runs.items():
        method, _, control = name.partition("-")
        assert run == same[name].replace(method=method, control=control or "none")


def test_the_longest_runs_begin_first() -> None:
    assert [one.run.method for one in DemoSettings().planned()] == ["covft", "covft", "full", "frozen"]


def test_the_quick_demo_is_smaller_and_keeps_what_is_given() -> None:
    quick, usual = DemoSettings.quick(fields={"tasks": ("count",), "steps": 3}), DemoSettings()
    run, full = quick.runs()["covft"], usual.runs()["covft"]
    assert (run.tasks, run.steps) == (("count",), 3)
    for name in ("first_steps", "batch", "train_scenes", "held_out_scenes", "held_out_questions"):
        assert getattr(run, name) < getattr(full, name)
    assert quick.backbone_run().steps < usual.backbone_run().steps
    assert quick.backbone_run().tasks == ("count",)


def test_fields_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps"):
        DemoSettings(fields={"steps": 0})
    with pytest.raises(ConfigError, match="juggling"):
        DemoSettings(fields={"tasks": ("count", "juggling")})
