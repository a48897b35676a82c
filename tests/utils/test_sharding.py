"""Sharded weights: gathered where they are copied, read or written, and refused by name where that is impossible.

A stand-in with DeepSpeed's interface partitions parameters within one process. `tests/distributed/` runs the same on
several processes, with DeepSpeed itself where it is installed.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import itertools
import sys
import types

import pytest
import torch
from torch import nn

import covft
from covft.checkpoints.fingerprint import fingerprint
from covft.checkpoints.folder import read_folder, write_folder
from covft.errors import CheckpointError, TextEncoderError, UnsupportedViTError
from covft.testing import ToyViT
from covft.utils.sharding import (
    assign,
    full,
    gathered,
    in_engine,
    is_main_process,
    is_partitioned,
    is_sharded,
    partition_like,
    shape_of,
    unpartitioned,
    whole_copy,
)

WIDTH = 8
LAYERS = (1, 2)


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


class GatheredParameters:
    """As DeepSpeed's: no nesting, and changes without a rank to take them from are lost."""

    def __init__(self, params, modifier_rank=None):
        self.params, self.modifier_rank = [p for p in params if hasattr(p, "ds_id")], modifier_rank

    def __enter__(self):
        for parameter in self.params:
            if parameter.ds_status is Status.AVAILABLE:
                raise RuntimeError("Nested GatheredParameters contexts cannot overlap parameters")
            parameter.data, parameter.ds_status = parameter.ds_tensor.clone(), Status.AVAILABLE

    def __exit__(self, *exc):
        for parameter in self.params:
            if self.modifier_rank is not None:
                parameter.ds_tensor = parameter.data.clone()
            parameter.data, parameter.ds_status = parameter.data.new_empty(0), Status.NOT_AVAILABLE


IDS = itertools.count()


def partition(parameters):
    for parameter in parameters:
        if not hasattr(parameter, "ds_id"):
            parameter.ds_id, parameter.ds_status, parameter.ds_shape = next(IDS), Status.NOT_AVAILABLE, parameter.shape
            parameter.ds_tensor, parameter.data = parameter.data.clone(), parameter.data.new_empty(0)
            parameter.convert_to_zero_parameters = lambda param_list: partition(param_list)


@pytest.fixture(autouse=True)
def _deepspeed(monkeypatch):
    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", module)


def partitioned(module):
    module = copy.deepcopy(module)
    partition(module.parameters())
    return module


def wrapped(vit, **settings):
    torch.manual_seed(3)
    return covft.wrap(vit, WIDTH, **{"layers": LAYERS, "experts": 2, **settings})


def perturbed(encoder):
    torch.manual_seed(4)
    for parameter in encoder.trainable_parameters():
        noise = 0.1 * torch.randn(shape_of(parameter))
        assign(parameter, full(parameter) + noise)
    return encoder


# One tensor


def test_gathered__is_full_inside_and_partitioned_again_outside():
    linear = nn.Linear(3, 2)
    value = linear.weight.detach().clone()
    partition(linear.parameters())
    assert is_partitioned(linear.weight)
    assert is_sharded(linear.weight)
    assert shape_of(linear.weight) == (2, 3)
    assert linear.weight.numel() == 0
    with gathered(linear.parameters()):
        assert torch.equal(linear.weight, value)
        assert not is_sharded(linear.weight)
        with gathered(linear.parameters()):  # the caller holds them already
            assert torch.equal(full(linear.weight), value)
        assert torch.equal(linear.weight, value)
    assert linear.weight.numel() == 0
    assert torch.equal(full(linear.weight), value)
    assert not full(linear.weight).requires_grad


def test_gathered__needs_no_deepspeed_for_ordinary_parameters(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    linear = nn.Linear(3, 2)
    with gathered(linear.parameters(), changed=True):
        assert full(linear.weight).data_ptr() == linear.weight.data_ptr()
    assert not is_sharded(linear.weight)
    assert whole_copy(linear) is linear
    partition_like(linear.parameters(), nn.Linear(1, 1))


@pytest.mark.parametrize("spread", [False, True])
def test_assign__stays(spread):
    linear = nn.Linear(3, 2)
    if spread:
        partition(linear.parameters())
    value = torch.randn(2, 3, dtype=torch.float64)
    assign(linear.weight, value)
    assert torch.equal(full(linear.weight), value.float())
    assert linear.weight.requires_grad
    assert is_partitioned(linear.weight) == spread


def test_a_copy_of_a_partitioned_module_has_ordinary_parameters():
    ffn = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    expected = {name: tensor.clone() for name, tensor in ffn.state_dict().items()}
    partition(ffn.parameters())
    twin = whole_copy(ffn)
    assert twin is not ffn
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())
    assert not any(hasattr(parameter, "ds_id") for parameter in twin.parameters())
    new = nn.Linear(2, 2)
    partition_like(ffn.parameters(), new)
    assert is_partitioned(new.weight)


def test_the_only_process_is_the_main_one():
    assert is_main_process()


# A ViT that ZeRO-3 partitioned before it is wrapped


@pytest.mark.parametrize("settings", [{}, {"routing": "sparse"}, {"routing": "uniform"}, {"train_norms": "none"}])
def test_wrap__upcycles_what_zero_partitioned(settings):
    vit = ToyViT()
    plain, spread = wrapped(copy.deepcopy(vit), **settings), wrapped(partitioned(vit), **settings)
    assert all(is_partitioned(parameter) for parameter in spread.vit.parameters())
    expected, found = plain.vit.state_dict(), spread.vit.state_dict(keep_vars=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(full(found[name]), tensor) for name, tensor in expected.items())
    trained = [name for name, p in plain.vit.named_parameters() if p.requires_grad]
    assert [name for name, p in spread.vit.named_parameters() if p.requires_grad] == trained
    assert plain.original.values.keys() == spread.original.values.keys()
    assert all(torch.equal(spread.original.values[name], v) for name, v in plain.original.values.items())
    # The originals are full on every process, since Trainer saves on one without the others.
    assert all(parameter.numel() for ffn in spread.original.ffns.values() for parameter in ffn.parameters())


def test_save__of_partitioned_weights_is_that_of_plain_ones(tmp_path):
    vit = ToyViT()
    perturbed(wrapped(copy.deepcopy(vit))).save_pretrained(tmp_path / "plain")
    spread = perturbed(wrapped(partitioned(vit)))
    spread.save_pretrained(tmp_path / "spread")
    (expected, settings), (found, config) = read_folder(tmp_path / "plain"), read_folder(tmp_path / "spread")
    assert config == settings
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(is_partitioned(parameter) for parameter in spread.vit.parameters())
    state = spread.adapted_state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_load__onto_partitioned_weights(tmp_path):
    vit = ToyViT()
    plain = wrapped(copy.deepcopy(vit))
    plain.vit.patches.bias.requires_grad_(True)  # by the caller
    perturbed(plain).save_pretrained(tmp_path)
    spread = covft.load(tmp_path, partitioned(vit), WIDTH)
    expected, found = plain.vit.state_dict(), spread.vit.state_dict(keep_vars=True)
    assert all(torch.equal(full(found[name]), tensor) for name, tensor in expected.items())
    assert spread.vit.patches.bias.requires_grad
    covft.unwrap(spread)
    expected, found = vit.state_dict(), spread.vit.state_dict(keep_vars=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(full(found[name]), tensor) for name, tensor in expected.items())


def test_load__onto_other_partitioned_weights_is_refused(tmp_path):
    wrapped(ToyViT()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="other base weights"):
        covft.load(tmp_path, partitioned(ToyViT()), WIDTH)


def test_fingerprint__is_that_of_the_full_weights():
    vit = ToyViT()
    expected = fingerprint(vit.state_dict().items())
    assert fingerprint(partitioned(vit).state_dict(keep_vars=True).items()) == expected


def test_an_empty_tensor_is_never_written(tmp_path):
    linear = nn.Linear(3, 2)
    partition(linear.parameters())
    for state in (linear.state_dict(), linear.state_dict(keep_vars=True), {"weight": torch.zeros(0)}):
        with pytest.raises(CheckpointError, match="weight") as caught:
            write_folder(tmp_path / "run", state, {}, "")
        assert "every process" in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_save__takes_what_another_library_gathered(tmp_path):
    vit = ToyViT()
    plain = perturbed(wrapped(copy.deepcopy(vit)))
    plain.save_pretrained(tmp_path / "plain")
    spread = wrapped(partitioned(vit))
    gatherer, state = covft.checkpoints.saving.save, plain.vit.state_dict()
    for nothing in (state, {}):  # processes that do not write need not wait, and often have nothing
        gatherer(spread, tmp_path / "other", gathered=nothing, writes=False)
    assert not (tmp_path / "other").exists()
    gatherer(spread, tmp_path / "spread", gathered=state)
    (expected, settings), (found, config) = read_folder(tmp_path / "plain"), read_folder(tmp_path / "spread")
    assert config == settings
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    state.pop("blocks.0.norm1.weight")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm1\.weight"):
        gatherer(spread, tmp_path / "spread", gathered=state)


# What is refused


def test_wrap__inside_an_engine_is_refused_and_changes_nothing():
    vit = ToyViT()
    vit.norm.weight._hp_mapping = object()
    assert in_engine(vit)
    before = list(vit.named_modules())
    with pytest.raises(UnsupportedViTError, match="DeepSpeed engine"):
        wrapped(vit)
    assert list(vit.named_modules()) == before


def test_wrap__of_weights_on_a_device_mesh_is_refused():
    vit = ToyViT()
    vit.blocks[1].mlp[0].weight.full_tensor = lambda: None
    with pytest.raises(UnsupportedViTError, match=r"blocks\.1\.mlp\.0\.weight"):
        wrapped(vit)


def test_load_into__an_engine_is_refused(tmp_path):
    encoder = wrapped(ToyViT())
    encoder.save_pretrained(tmp_path)
    encoder.vit.norm.weight._hp_mapping = object()
    with pytest.raises(CheckpointError, match="inside a DeepSpeed engine"):
        covft.checkpoints.loading.load_into(encoder, tmp_path)


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, texts):
        return torch.zeros(len(texts), WIDTH)


def test_wrap__refuses_a_partitioned_text_encoder():
    texts = Texts()
    partition(texts.parameters())
    with pytest.raises(TextEncoderError, match="partitioned by ZeRO-3"):
        covft.wrap(ToyViT(), texts)


def test_unpartitioned__switches_zero_off_in_transformers_and_on_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "deepspeed")
    integration = pytest.importorskip("transformers.integrations.deepspeed")

    class Config:
        def is_zero3(self):
            return True

    config = Config()
    with unpartitioned():
        assert not integration.is_deepspeed_zero3_enabled()
    integration.set_hf_deepspeed_config(config)
    try:
        with contextlib.suppress(ZeroDivisionError), unpartitioned():
            assert not integration.is_deepspeed_zero3_enabled()
            _ = 1 / 0
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()


# The meta device


def test_meta__a_vit_is_wrapped_and_gets_its_values_later(tmp_path):
    real = perturbed(wrapped(ToyViT())).eval()
    with torch.device("meta"):
        vit = ToyViT()
    encoder = wrapped(vit).eval()
    assert all(parameter.is_meta for parameter in encoder.parameters())
    with pytest.raises(CheckpointError, match="meta device"):
        encoder.save_pretrained(tmp_path / "run")
    encoder.to_empty(device="cpu")
    encoder.load_state_dict(real.state_dict())
    images, text = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
    with torch.no_grad():
        assert torch.equal(encoder(images, text), real(images, text))
    # The FFNs at the time of wrap() are unknown here, so nothing is invented.
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.0\.weight|norm1\.weight"):
        encoder.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnsupportedViTError, match="wrapped on the meta device"):
        covft.unwrap(encoder)


def test_meta__wrapped_and_unwrapped_there(tmp_path):
    with torch.device("meta"):
        vit = ToyViT()
    names = list(vit.state_dict())
    assert list(covft.unwrap(wrapped(vit)).state_dict()) == names


def test_meta__ffns_without_values_among_real_weights_are_refused():
    vit = ToyViT()
    vit.blocks[1].mlp.to("meta")
    before = list(vit.named_modules())
    with pytest.raises(UnsupportedViTError, match=r"blocks\.1\.mlp are on the meta device"):
        wrapped(vit)
    assert list(vit.named_modules()) == before
    wrapped(vit, layers=[2])
