"""Settings of runs, and their rows on file."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from covft.errors import CheckpointError, ConfigError
from study.runs.rows import Rows
from study.runs.settings import RunSettings


def test_names_say_what_differs_and_differ() -> None:
    assert RunSettings().name == "covft-seed0"
    assert RunSettings(control="shuffled", seed=2).name == "covft-shuffled-seed2"
    assert RunSettings(method="lora", options={"r": 8}).name == "lora-r8-seed0"
    assert RunSettings(method="none").name == "frozen-seed0"
    runs = [RunSettings(tasks=("count", "word")), RunSettings(tasks=("count", "photo")), RunSettings(tokens=9)]
    assert len({run.name for run in runs}) == 3
    assert RunSettings(control="shuffled").label == "covft, texts shuffled"


def test_settings_survive_json() -> None:
    run = RunSettings(
        method="lora", options={"r": 8}, language={"method": "lora", "r": 4}, tasks=("count",), layers=None
    )
    assert RunSettings.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"control": "shuffeld"}, "shuffled"),
        ({"tasks": ("juggling",)}, "juggling"),
        ({"batch": 10, "per_picture": 4}, "multiple"),
        ({"tokens": 5}, "36"),
        ({"fraction": 0.0}, "share"),
        ({"method": "lora", "control": "uniform"}, "routing"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunSettings(**fields)


def _row(run: RunSettings) -> dict:
    return {"name": run.name, "studies": ["methods"]}


def test_rows_are_read_back_and_missing_runs_found(tmp_path: Path) -> None:
    rows, runs = Rows(tmp_path / "rows"), [RunSettings(seed=seed) for seed in range(3)]
    assert [run.seed for run in rows.missing([*runs, runs[0]])] == [0, 1, 2]
    rows.write(_row(runs[1]))
    rows.add_studies(runs[1].name, ["controls", "methods"])
    assert [run.seed for run in rows.missing(runs)] == [0, 2]
    assert rows.read() == [{"name": "covft-seed1", "studies": ["methods", "controls"]}]
    (tmp_path / "rows" / "covft-seed0.json").write_text("{")
    with pytest.raises(CheckpointError, match="covft-seed0"):
        rows.read()


def _die_with(folder: Path, name: str) -> None:
    import os

    claim = Rows(folder).claim(name)
    assert claim.__enter__()
    os._exit(9)


def test_a_run_is_claimed_once_and_anew_after_a_kill(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    with rows.claim("covft-seed0") as first, rows.claim("covft-seed0") as second, rows.claim("lora-seed0") as other:
        assert (first, second, other) == (True, False, True)
    killed = multiprocessing.get_context("fork").Process(target=_die_with, args=(tmp_path, "covft-seed0"))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    assert (tmp_path / ".locks" / "covft-seed0.lock").is_file()
    with rows.claim("covft-seed0") as again:
        assert again
    rows.write(_row(RunSettings()))
    with rows.claim("covft-seed0") as finished:
        assert not finished
