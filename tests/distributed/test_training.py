"""Two processes do what one does with the batch of both, also where one of them sees no image."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

import covft
from covft.integrations import attach, get_encoder
from tests.distributed import processes
from tests.distributed.llava import (
    LLAVA,
    SETTINGS,
    TEXTS,
    attached_model,
    batch_of,
    lora_model,
    loss_of,
    option_loss,
    option_model,
    trained_gradients,
    tuned_model,
)
from tests.helpers.training import trained_updates, write_folder

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.usefixtures("quiet"),
]
ROUTINGS = ["dense", "sparse"]


@functools.cache
def alone(folder, routing="dense"):
    """The gradients of one process."""
    model = attached_model(folder, routing=routing)
    loss_of(model, 0, 1).backward()
    return trained_gradients(model)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-8, atol=1e-10), name


def assert_same_tensors(file, other):
    found, expected = load_file(file), load_file(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_same_files(folder, other):
    """Every file of two saved folders: tensors to the bit, configs to the letter."""
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    assert names
    for name in sorted(names):
        if name.suffix == ".safetensors":
            assert_same_tensors(folder / name, other / name)
        elif name.suffix == ".json":
            found, expected = json.loads((folder / name).read_text()), json.loads((other / name).read_text())
            assert found == expected, name
        else:
            assert (folder / name).read_text() == (other / name).read_text()


def test_the_batch_is_the_hard_case(ddp):
    one, other = batch_of(0, 2), batch_of(1, 2)
    assert one["image_flags"].tolist() == [1, 1, 1]
    assert one["context_index"].tolist() == [0, 1, 1]
    assert other["image_flags"].tolist() == [0, 0]
    gradients = alone(ddp)
    tower = [name for name in gradients if "vision_tower" in name]
    assert len(tower) > 30
    assert all(gradients[name].abs().max() > 1e-7 for name in tower), "nothing to compare"


# DDP


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    processes.run("ddp", folder)
    return folder


@pytest.mark.parametrize("routing", ROUTINGS)
def test_ddp__gradients_are_those_of_one_process(ddp, routing):
    for rank in range(2):
        assert_close(torch.load(ddp / f"{routing}-{rank}.pt"), alone(ddp, routing))


def test_ddp__a_save_of_all_processes_is_the_save_of_one(ddp, tmp_path):
    attached_model(ddp, routing="sparse").save_pretrained(tmp_path)
    assert_same_files(ddp / "saved", tmp_path)


def test_ddp__updates_are_compared_as_in_one_process(tmp_path):
    write_folder(tmp_path / "data")  # text alone in some rows, so that one process sees no image
    processes.run("updates", tmp_path)
    first, second = (json.loads((tmp_path / f"log-{rank}.json").read_text()) for rank in range(2))
    expected = trained_updates(tmp_path, per_device_train_batch_size=2).state.log_history
    figures = {name for entry in expected for name in entry if name.startswith("covft/update")}
    assert figures == {"covft/updates", "covft/update_cosine", "covft/update_cosine_std"}
    for found, alone in zip(first, expected, strict=True):
        assert {name: found.get(name) for name in figures} == pytest.approx(
            {name: alone.get(name) for name in figures}, abs=1e-3
        )
    assert not any(figures & set(entry) for entry in second), "the first process logs"


# Every method


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    processes.run("tuned", folder)
    return folder


def gradients_of(folder, method):
    model = tuned_model(folder, method)
    loss_of(model, 0, 1).backward()
    return trained_gradients(model)


@pytest.mark.parametrize("method", covft.tuning.methods())
def test_tuned__gradients_are_those_of_one_process(tuned, method):
    expected = gradients_of(tuned, method)
    for rank in range(2):
        assert_close(torch.load(tuned / f"{method}-{rank}.pt"), expected)


@pytest.mark.parametrize("method", ["lora", "bitfit", "adaln", "q_moe"])
def test_tuned__sharded_it_has_the_gradients_and_the_files_of_one_process(tuned, method, tmp_path):
    assert_close(torch.load(tuned / f"{method}-fsdp2.pt"), gradients_of(tuned, method))
    tuned_model(tuned, method).save_pretrained(tmp_path)
    assert_same_files(tuned / f"{method}-saved", tmp_path)


# Options of covft


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    processes.run("options", folder)
    return folder


@pytest.mark.parametrize("option", SETTINGS)
def test_options__gradients_and_files_are_those_of_one_process(options, option, tmp_path):
    model = option_model(options, option)
    option_loss(model, option, 0, 1).backward()
    expected = trained_gradients(model)
    plain = alone(options)
    if option == "strength":
        assert any(not torch.allclose(expected[name], plain[name]) for name in plain), "the dial counts"
    else:
        own = [name for name in expected if name not in plain]
        assert own
        assert all(expected[name].abs().max() > 1e-9 for name in own)
    for found in ("0", "1", "fsdp2-False", "fsdp2-True"):
        assert_close(torch.load(options / f"{option}-{found}.pt"), expected)
    option_model(options, option).save_pretrained(tmp_path)
    assert_same_files(options / f"{option}-saved", tmp_path)


# FSDP2


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    processes.run("fsdp2", folder)
    return folder


@pytest.mark.parametrize("routing", ROUTINGS)
def test_fsdp2__gradients_are_those_of_one_process(fsdp2, routing):
    assert_close(torch.load(fsdp2 / f"{routing}.pt"), alone(fsdp2, routing))


@pytest.mark.parametrize("way", ["saved", "gathered", "first"])
def test_fsdp2__every_way_to_save_gives_the_files_of_one_process(fsdp2, way, tmp_path):
    attached_model(fsdp2).save_pretrained(tmp_path)
    assert_same_files(fsdp2 / way, tmp_path)


def test_fsdp2__the_encoder_alone_saves_the_same(fsdp2, tmp_path):
    get_encoder(attached_model(fsdp2)).save_pretrained(tmp_path)
    assert_same_files(fsdp2 / "tower", tmp_path)


def test_fsdp2__an_optimizer_step_is_that_of_one_process(fsdp2):
    model = attached_model(fsdp2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss_of(model, 0, 1).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    stepped = torch.load(fsdp2 / "stepped.pt")
    assert stepped.keys() == before.keys()
    for name, tensor in model.state_dict().items():
        # Where a gradient is rounding alone, Adam takes a step of either sign.
        certain = torch.ones_like(tensor, dtype=torch.bool)
        if name in (gradients := alone(fsdp2)):
            certain = gradients[name].abs() > 1e-9
        assert torch.allclose(stepped[name][certain], tensor[certain], rtol=1e-8, atol=1e-8), name
    moved = [name for name, tensor in stepped.items() if not torch.equal(tensor, before[name])]
    assert set(moved) == set(alone(fsdp2))


def test_fsdp2__a_folder_is_loaded_into_a_sharded_encoder(fsdp2):
    expected = get_encoder(attached_model(fsdp2)).adapted_state_dict()
    loaded = torch.load(fsdp2 / "loaded.pt")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_fsdp2__weights_that_only_one_process_had_are_spread_and_saved(fsdp2, tmp_path):
    attached_model(fsdp2).save_pretrained(tmp_path)
    assert_same_tensors(fsdp2 / "spread" / "model.safetensors", tmp_path / "model.safetensors")
    assert_same_files(fsdp2 / "spread" / "covft", tmp_path / "covft")
    assert_same_files(fsdp2 / "spread-tower", tmp_path / "covft")


def test_fsdp2__what_was_saved_is_loaded_by_one_process(fsdp2):
    from transformers import LlavaForConditionalGeneration

    expected, batch = attached_model(fsdp2).eval(), batch_of(0, 1)
    model = LlavaForConditionalGeneration.from_pretrained(fsdp2 / "saved", dtype=torch.float64)
    attach(model, TEXTS, tokenizer=LLAVA.tokenizer, pretrained=fsdp2 / "saved" / "covft")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, expected(**batch).logits)


@pytest.mark.slow
def test_fsdp2__peft_saves_adapters_tower_and_projector_from_gathered_weights(tmp_path):
    processes.run("fsdp2_lora", tmp_path)
    alone = lora_model(tmp_path)
    alone.save_pretrained(tmp_path / "alone")
    assert (tmp_path / "alone" / "covft" / "trained.safetensors").is_file()
    assert_same_files(tmp_path / "saved", tmp_path / "alone")
    for file in ("trained.json", "trained.safetensors"):
        (tmp_path / "alone" / "covft" / file).unlink()
    assert_same_files(tmp_path / "adapters", tmp_path / "alone")
    assert not (tmp_path / "checkpoint-1" / "covft").exists()
