"""Where the tests of this folder run: `--device`, CUDA by default; and which of them are the dry run on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.quiet import quiet

__all__ = ["quiet"]
FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The one place that a test of this folder takes its device from."""
    name = request.config.getoption("--device")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(name)
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return found


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(config, items):
    own = [item for item in items if FOLDER in item.path.parents]
    asked = config.getoption("--device") is not None
    for item in own:
        # Foreign code may warn on a GPU where it does not on a CPU, and in releases that nothing else here runs on.
        item.add_marker(pytest.mark.filterwarnings("default"))
        quick = item.get_closest_marker("quick") is not None
        if asked or torch.cuda.is_available() or not quick:
            item.add_marker(pytest.mark.gpu)
    if config.getoption("--quick"):
        left_out = [item for item in own if item.get_closest_marker("quick") is None]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
