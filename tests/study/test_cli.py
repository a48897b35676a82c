"""The command line: its options, its errors and its imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from study.cli import app, main


def test_help_lists_the_options() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.output)
    for option in ("--steps", "--seed", "--tasks", "--methods", "--output", "--quick", "pretrain", "prepare"):
        assert option in plain


def test_an_unknown_task_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--tasks", "caption,juggling", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "juggling" in shown
    assert "grounding" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("methods", ["juggling", "covft-juggling", "frozen-uniform", "", "full,full"])
def test_methods_that_cannot_be_run_are_refused_before_anything_is_written(
    methods: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--methods", methods, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "Expected:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_pretraining_on_a_device_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--device", "cuda", "--output", str(tmp_path / "out")])
    assert "--device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line_imports_no_heavy_library() -> None:
    heavy = "torch transformers sklearn skimage matplotlib easy_vqa"
    code = f"import sys, study.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
