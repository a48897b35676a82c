"""`covft paper-table` and `covft forgetting`."""

import pytest

from covft.cli import main
from tests.helpers.evaluations import LMMS_VALUES, SOURCES, write_lmms


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process; returns its exit code, output and error output."""
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def test_paper_table(run, tmp_path):
    write_lmms(tmp_path, LMMS_VALUES, sources=SOURCES)
    code, out, err = run("paper-table", tmp_path, "--beside", "LoRA 7B", "--beside", "CoVFT 7B")
    assert (code, err) == (0, "")
    assert "MME                  1500.0   1494.5    1525.2" in out.splitlines()
    code, out, err = run("paper-table", tmp_path, "--engine", "vlmevalkit")
    assert (code, out) == (2, "")
    assert "EvaluationError" in err


def test_forgetting(run, tmp_path):
    write_lmms(tmp_path / "before", {"gqa": 0.6, "scienceqa_img": 0.5})
    write_lmms(tmp_path / "after", {"gqa": 0.5, "scienceqa_img": 0.8})
    code, out, err = run("forgetting", tmp_path / "before", tmp_path / "after")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "E +30.00   F +10.00   O 65.00"
