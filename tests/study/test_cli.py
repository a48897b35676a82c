"""The command line: what it offers, and what it says when asked for what is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from study.cli import app


def test_help_offers_the_settings() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.output)
    for option in ("--steps", "--seed", "--tasks", "--method", "--output", "--quick", "pretrain"):
        assert option in plain


def test_an_unknown_task_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["--tasks", "caption,juggling", "--output", str(tmp_path / "out")])
    assert shown.exit_code == 2
    assert "juggling" in shown.output
    assert "grounding" in shown.output
    assert not (tmp_path / "out").exists()


def test_the_command_line_loads_none_of_the_heavy_libraries() -> None:
    heavy = "torch transformers sklearn skimage matplotlib easy_vqa"
    code = f"import sys, study.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
