"""ZeRO-2 and ZeRO-3 on two processes, where DeepSpeed is installed; `tests/utils/test_sharding.py` runs everywhere."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from covft.checkpoints.fingerprint import difference
from covft.checkpoints.folder import read_folder
from covft.integrations import detach, get_encoder
from tests.distributed import processes
from tests.distributed.llava import attached_model, loss_of, trained_gradients

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    processes.run(request.param, folder)
    return folder


@functools.cache
def alone(folder):
    """A model of one process, before its first step, and its gradients."""
    model = attached_model(folder, torch.float32)
    loss_of(model, 0, 1).backward()
    return model, trained_gradients(model)


def test_zero__gradients_are_those_of_one_process(folder):
    expected = alone(folder)[1]
    for rank in range(2):
        found = torch.load(folder / f"dense-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            scale = max(tensor.abs().max().item(), 1e-3)
            assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5 * scale), name


@pytest.mark.parametrize("when", ["before", "tower", "saved/covft"])
def test_zero__what_is_saved_is_what_one_process_saves(folder, when, tmp_path):
    get_encoder(alone(folder)[0]).save_pretrained(tmp_path)
    (expected, settings), (found, config) = read_folder(tmp_path), read_folder(folder / when)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert config == settings
    assert difference(config["base"]["fingerprint"], settings["base"]["fingerprint"]) is None


def test_zero__the_model_beside_it_is_the_one_that_attach_was_given(folder):
    from transformers import LlavaForConditionalGeneration

    base, saved = (
        LlavaForConditionalGeneration.from_pretrained(folder / name).state_dict() for name in ("base", "saved")
    )
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())


def test_zero__a_step_changes_all_that_is_trained_in_the_tower(folder):
    before, after = get_encoder(alone(folder)[0]).adapted_state_dict(), torch.load(folder / "stepped.pt")
    assert after.keys() == before.keys()
    assert all(after[name].shape == tensor.shape for name, tensor in before.items())
    assert not [name for name, tensor in before.items() if torch.equal(after[name], tensor)]


def test_zero__a_saved_tower_is_loaded_and_taken_out_again(folder):
    expected, loaded = get_encoder(alone(folder)[0]).adapted_state_dict(), torch.load(folder / "loaded.pt")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    vit = detach(attached_model(folder, torch.float32)).model.vision_tower.state_dict()
    detached = torch.load(folder / "detached.pt")
    assert detached.keys() == vit.keys()
    assert all(torch.equal(detached[name], tensor) for name, tensor in vit.items())
