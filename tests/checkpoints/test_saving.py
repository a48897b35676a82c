"""What a saved folder holds."""

import copy
import json

import pytest
import torch

import covft
from covft import CoVFTConfig
from covft.checkpoints.folder import read_folder
from covft.checkpoints.loading import load_into
from covft.errors import CheckpointError
from covft.utils.transformers_names import saved_names
from tests.helpers.checkpoints import TOWERS, WIDTH, Words, inputs, timm_vit, trained, wrapped
from tests.helpers.towers import perturb


@pytest.mark.parametrize("tower", TOWERS)
def test_only_what_was_added_or_trained_is_saved(tower, tmp_path):
    base = TOWERS[tower]()
    encoder = trained(wrapped(copy.deepcopy(base).train()))
    encoder.save_pretrained(tmp_path)
    tensors, _ = read_folder(tmp_path)
    named = saved_names(encoder.vit)
    trainable = {named(name) for name, p in encoder.vit.named_parameters() if p.requires_grad}
    assert set(tensors) == trainable
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "covft_config.json",
        "model.safetensors",
    ]


def test_the_folder_names_its_base_and_its_text_encoder(saved):
    encoder, base, folder = saved
    config = json.loads((folder / "covft_config.json").read_text(encoding="utf-8"))
    assert CoVFTConfig.from_dict(config["covft"]) == encoder.covft_config
    assert config["library_version"] == covft.__version__
    assert config["base"]["library"] == "transformers"
    assert config["base"]["class_name"] == "CLIPVisionModel"
    assert config["base"]["source"] is None  # built from a config
    assert config["base"]["fingerprint"]["num_tensors"] == len(base.state_dict())
    assert config["text"]["text_dim"] == WIDTH
    assert config["extra"] == []


def test_the_text_encoder_is_never_saved(tmp_path):
    words, base = Words(), timm_vit()
    encoder = covft.wrap(copy.deepcopy(base), words, layers=(1, 2), experts=2)
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    tensors, config = read_folder(tmp_path)
    table = words.table.weight.detach()
    assert not [name for name in [*tensors, *encoder.state_dict()] if "table" in name or "text_encoder" in name]
    assert not any(t.shape == table.shape and torch.equal(t, table) for t in tensors.values())
    assert config["text"]["text_dim"] == WIDTH
    images, texts = torch.randn(2, 3, 32, 32), ["left?", "right?"]
    loaded = covft.load(tmp_path, copy.deepcopy(base), words)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images, texts), encoder.eval()(images, texts))
        assert not torch.equal(loaded(images, texts), loaded(images, texts[::-1]))


def test_parameters_that_the_caller_trained_are_saved_and_restored(tmp_path):
    base = timm_vit()
    encoder = wrapped(copy.deepcopy(base))
    encoder.vit.head.weight.requires_grad_(True)
    encoder.vit.cls_token.requires_grad_(True)
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    tensors, config = read_folder(tmp_path)
    assert config["extra"] == ["cls_token", "head.weight"]
    assert torch.equal(tensors["head.weight"], encoder.vit.head.weight)
    loaded = covft.load(tmp_path, copy.deepcopy(base), WIDTH)
    assert torch.equal(loaded.vit.head.weight, encoder.vit.head.weight)
    assert torch.equal(loaded.vit.cls_token, encoder.vit.cls_token)
    assert loaded.vit.head.weight.requires_grad
    assert not loaded.vit.head.bias.requires_grad
    images, text = inputs()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images, text), encoder.eval()(images, text))


def test_they_are_loaded_into_an_encoder_that_trains_them_too(tmp_path):
    base = timm_vit()
    encoder, other = wrapped(copy.deepcopy(base)), wrapped(copy.deepcopy(base))
    for each in (encoder, other):
        each.vit.head.weight.requires_grad_(True)
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    for _ in range(2):  # as a run that is resumed, and then loads its best checkpoint
        load_into(other, tmp_path)
        state = encoder.vit.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.vit.state_dict().items())
    assert torch.equal(covft.unwrap(other).head.weight, base.head.weight)


def test_a_loaded_encoder_can_be_saved_and_loaded_again(tmp_path):
    base = timm_vit()
    encoder = wrapped(copy.deepcopy(base))
    encoder.vit.head.weight.requires_grad_(True)
    perturb(encoder)
    encoder.save_pretrained(tmp_path / "one")
    covft.load(tmp_path / "one", copy.deepcopy(base), WIDTH).save_pretrained(tmp_path / "two")
    (one, first), (two, second) = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert first == second
    assert one.keys() == two.keys()
    loaded = covft.load(tmp_path / "two", copy.deepcopy(base), WIDTH)
    assert torch.equal(loaded.vit.head.weight, encoder.vit.head.weight)


def test_a_second_save_writes_the_same_folder(saved, tmp_path):
    _, base, folder = saved
    covft.load(folder, copy.deepcopy(base), WIDTH).save_pretrained(tmp_path / "again")
    for name in ("covft_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_weights_without_values_are_not_saved(tmp_path):
    with torch.device("meta"):
        vit = timm_vit()
    with pytest.raises(CheckpointError, match="meta device"):
        wrapped(vit).save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()
