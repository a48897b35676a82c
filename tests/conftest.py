"""What every test gets: no network, a seed of its own, and one torch thread per worker and per child."""

import os

# Before anything imports a Hugging Face library, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import random
import zlib

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", help="where tests/gpu runs, such as cuda:1 or cpu; cuda by default")
    parser.addoption("--quick", action="store_true", help="of tests/gpu, only what a CPU runs by default")


def pytest_configure(config):
    # Workers of xdist share the cores; more threads than cores make every matmul of them slower. What they start
    # has as many: some kernels add in another order with two threads, and outputs are compared bit for bit.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items):
    cases = {}
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None:
            number = cases[item.function] = cases.get(item.function, -1) + 1
            if number % sampled.args[0]:
                item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds each test by its name: the same numbers alone, in any order and on any worker."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def _torch_defaults_stay():
    """A test that leaves a default dtype, a grad mode or autocast behind breaks its neighbours."""
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
