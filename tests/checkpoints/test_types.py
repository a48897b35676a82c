"""The types and values of saved weights: those that were saved, and numbers."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import covft
from covft.checkpoints.folder import read_folder, write_folder
from covft.errors import CheckpointError
from covft.utils.transformers_names import saved_names
from tests.helpers.checkpoints import WIDTH, clip_vit, wrapped
from tests.helpers.snapshots import assert_unchanged, snapshot


def rewritten(folder, change, **fields):
    """Write the same folder with other tensors, and the digest of them."""
    tensors, config = read_folder(folder)
    for part in ("format", "weights"):
        config.pop(part)
    change(tensors)
    write_folder(folder, tensors, {**config, **fields}, "")


def refused(folder, base, match):
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match=match):
        covft.load(folder, vit, WIDTH)
    assert_unchanged(vit, before)


OTHER = ["float16", "bfloat16", "float64", "int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", OTHER)
def test_weights_of_another_type_than_was_saved_are_refused(dtype, saved):
    _, base, folder = saved

    def change(tensors):
        name = sorted(tensors)[3]
        tensors[name] = tensors[name].to(getattr(torch, dtype))

    rewritten(folder, change)
    refused(folder, base, f"other types than those that were saved, in 1 tensors[\\s\\S]*{dtype}")


@pytest.mark.parametrize("dtype", ["int64", "bool", "int32", "complex64"])
def test_weights_that_are_not_of_the_kind_of_the_vit_are_refused_even_if_the_configuration_says_so(dtype, saved):
    _, base, folder = saved

    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(getattr(torch, dtype))

    rewritten(folder, change, dtype=dtype)
    refused(folder, base, "another kind|is damaged, or of a later version of covft: dtype")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value, saved):
    _, base, folder = saved
    name = sorted(read_folder(folder)[0])[5]

    def change(tensors):
        tensors[name].view(-1)[-1] = value

    rewritten(folder, change)
    refused(folder, base, f"not finite[\\s\\S]*{name}")


def test_the_types_are_written(tmp_path):
    vit = clip_vit()
    encoder = wrapped(vit)
    for name in encoder.norms[:2]:
        vit.get_parameter(name).data = vit.get_parameter(name).data.double()
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "covft_config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert config["other_dtypes"] == dict.fromkeys(map(saved_names(vit), encoder.norms[:2]), "float64")
    covft.load(tmp_path, covft.unwrap(encoder), WIDTH)
