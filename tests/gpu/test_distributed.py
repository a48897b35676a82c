"""Several GPUs do what one does with the batch of all, also where one sees no image: NCCL, or gloo in a dry run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import processes
from tests.distributed.llava import attached_model, loss_of, trained_gradients

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def world(device) -> int:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU; this needs two")
    return 2


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(scenario, world, device, tmp_path):
    processes.run(scenario, tmp_path, world, device.type, worker="tests.gpu.worker")
    for routing in ("dense", "sparse"):
        model = attached_model(tmp_path, routing=routing).to(device)
        loss_of(model, 0, 1).backward()
        wanted, found = trained_gradients(model), torch.load(tmp_path / f"{routing}.pt", map_location=device)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=1e-8, atol=1e-10), name
    if scenario == "fsdp2":
        losses = torch.load(tmp_path / "losses.pt")
        assert losses[2] < losses[0]
        start = load_file(tmp_path / "tower" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in start.values())
