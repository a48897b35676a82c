"""`python -m study deploy`: a trained run in the forms in which it may be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from study.cli import app
from study.deployment.trained import read

TINY: dict[str, Any] = {
    "first_steps": 1, "train_scenes": 24, "held_out_scenes": 24, "held_out_questions": 4, "batch": 8,
    "text_encoder": "bag_of_words", "tasks": ["existence", "count", "grounding"],
}  # fmt: skip


@pytest.mark.long
def test_every_form_is_scored_and_measured(tmp_path: Path) -> None:
    fields = [f"{name}={json.dumps(value)}" for name, value in TINY.items()]
    given = [word for field in fields for word in ("--field", field)]
    sizes = ["--steps", "3", "--calibration", "12", "--tested", "12", "--distill", "2"]
    model, output = tmp_path / "model.safetensors", tmp_path / "out.json"
    arguments = ["deploy", "--model", str(model), "--output", str(output), "--markdown", *sizes, *given]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == [
        "mixture of experts", "merge", "merge, 2 steps of distillation", "tower as before tuning",
        "compress, rank 16", "skip_experts, below 0.1",
    ]  # fmt: skip
    mixture, merged, distilled, untuned, compressed, _ = found["rows"]
    assert set(mixture["scores"]) == set(TINY["tasks"])
    assert mixture["moved"] is None
    assert 0 < merged["moved"]["all"] < untuned["moved"]["all"]
    assert merged["gflops"] == untuned["gflops"] < compressed["gflops"] < mixture["gflops"]
    assert merged["bytes"] == distilled["bytes"] == untuned["bytes"] < compressed["bytes"] < mixture["bytes"]
    assert [row["needs_text"] for row in found["rows"]] == [True, False, False, False, True, True]
    assert merged["report"]["total"]["features"] == pytest.approx(merged["moved"]["all"], rel=0.5)
    again = read(model)
    assert again.settings.steps == 3
