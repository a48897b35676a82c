"""A saved projector: from one model to another, and what is refused."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from covft.errors import CheckpointError, UnsupportedViTError
from covft.integrations import build_internvl, build_llava, load_projector, save_projector
from covft.integrations.building.projector import find_projector


def test_a_projector_goes_from_one_model_to_another(parts, tokenizer, tmp_path):
    first = build_llava(parts / "clip", parts / "llama", tokenizer)
    second = build_llava(parts / "clip", parts / "llama", tokenizer, dtype=torch.bfloat16)
    path = save_projector(first, tmp_path / "stage1")
    assert path == tmp_path / "stage1" / "projector.safetensors"
    assert [file.name for file in path.parent.iterdir()] == ["projector.safetensors"]
    load_projector(second, tmp_path / "stage1")
    for ours, theirs in zip(
        second.model.multi_modal_projector.parameters(), first.model.multi_modal_projector.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0)
        assert ours.requires_grad
    load_projector(second, path)  # the file itself does, too


def test_another_projector_is_refused_and_nothing_changes(parts, tokenizer, tmp_path):
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_projector(build_internvl(parts / "internvit", parts / "llama", tokenizer), tmp_path / "internvl")
    with pytest.raises(CheckpointError, match=r"not a projector of this model[\s\S]*layer_norm"):
        load_projector(model, tmp_path / "internvl")
    with pytest.raises(CheckpointError, match=r"The projector .* does not exist"):
        load_projector(model, tmp_path)
    whole = save_projector(model, tmp_path / "cut")
    data = whole.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        whole.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            load_projector(model, tmp_path / "cut")
    for change in (lambda t: t.fill_(torch.nan), lambda t: t.int(), lambda t: t.to(torch.complex64)):
        weights = {name: tensor.clone() for name, tensor in find_projector(model).state_dict().items()}
        weights["linear_1.bias"] = change(weights["linear_1.bias"])
        save_file(weights, whole)
        with pytest.raises(CheckpointError, match=r"not finite|not floating-point"):
            load_projector(model, tmp_path / "cut")
    with pytest.raises(UnsupportedViTError, match="0 projectors"):
        save_projector(nn.Linear(2, 2), tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_save_that_fails_leaves_the_old_projector(parts, tokenizer, tmp_path, monkeypatch):
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    path = save_projector(model, tmp_path)
    before = path.read_bytes()

    def full_disk(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("covft.utils.files.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space"):
        save_projector(model, tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_shared_out_weights_are_gathered(parts, tokenizer, tmp_path, monkeypatch):
    """ZeRO-3 leaves empty tensors behind, and gives them their values for as long as they are gathered."""
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    whole = {name: tensor.clone() for name, tensor in model.model.multi_modal_projector.state_dict().items()}
    values = {}
    for number, parameter in enumerate(model.model.multi_modal_projector.parameters()):
        parameter.ds_id, values[number] = number, parameter.data
        parameter.ds_shape, parameter.ds_status = parameter.shape, types.SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = torch.empty(0)

    class GatheredParameters:
        def __init__(self, parameters, modifier_rank):
            self.parameters = parameters

        def __enter__(self):
            for parameter in self.parameters:
                parameter.data = values[parameter.ds_id]

        def __exit__(self, *error):
            for parameter in self.parameters:
                parameter.data = torch.empty(0)

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    save_projector(model, tmp_path)
    again = build_llava(parts / "clip", parts / "llama", tokenizer)
    load_projector(again, tmp_path)
    for name, tensor in again.model.multi_modal_projector.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0)
