"""The real lmms-eval, in the environment that `make real REAL_ARGS=lmms_eval` builds."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.real.bench import Bench
from tests.real.engines import lmms_eval
from tests.real.environments import REAL
from tests.real.results import Result

PYTHON = REAL / "lmms_eval" / "env" / "bin" / "python"


@pytest.mark.slow
def test_lmms_eval__answers_are_those_of_generate(tmp_path):
    """Three models on a local task, a failing row, two processes: every check of the engine holds."""
    if not PYTHON.is_file():
        pytest.skip(f"no {Path(*PYTHON.parts[-4:])}: make real REAL_ARGS=lmms_eval")
    result = Result("lmms_eval", "", "")
    lmms_eval.run(Bench(PYTHON, tmp_path, result, Console(quiet=True)))
    assert len(result.checks) == 9
    assert [check for check in result.checks if not check["holds"]] == []
