"""A loaded encoder computes what the saved one did, or loading is refused and the ViT stays as it was."""

import copy
import json
import re
import shutil
import warnings

import pytest
import torch

import covft
from covft.adapters.sources import load_vit
from covft.checkpoints.folder import read_folder, write_folder
from covft.errors import CheckpointError, UnsupportedViTError
from covft.testing import HashTextEncoder
from tests.helpers.checkpoints import TOWERS, WIDTH, Words, clip_vit, inputs, timm_vit, trained, wrapped
from tests.helpers.hub import put_in_cache, use_cache
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import features, perturb

transformers = pytest.importorskip("transformers")


VARIANTS = [
    {},
    {"context": "image"},
    {"context": "text", "train_norms": "none"},
    {"context": "concat", "routing": "sparse", "experts": 3, "top_k": 2, "train_norms": "adapted"},
    {"routing": "sparse", "experts": 3, "top_k": 1},
    {"routing": "uniform"},
    {"routing": "random", "experts": 3, "top_k": 2},
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_a_loaded_encoder_gives_the_outputs_of_the_saved_one(tower, settings, tmp_path):
    base = TOWERS[tower]()
    encoder = trained(wrapped(copy.deepcopy(base).train(), **settings)).eval()
    norms = list(encoder.original.values)
    assert bool(norms) == (settings.get("train_norms") != "none")
    encoder.save_pretrained(tmp_path)

    fresh = copy.deepcopy(base).eval()
    loaded = covft.load(tmp_path, fresh, WIDTH)

    assert loaded.vit is fresh
    assert loaded.covft_config == encoder.covft_config
    assert loaded.layers == (1, 2)
    images, text = inputs()
    with torch.no_grad():
        output, again = features(encoder(images, text)), features(loaded(images, text))
        start = features(base.eval()(images))
    assert torch.equal(output, again)
    assert not torch.allclose(output, start, atol=1e-2)
    before, after = encoder.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in norms:  # they have moved, so loading them is tested too
        assert not torch.equal(after[f"vit.{name}"], base.state_dict()[name])
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in encoder.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(("kept", "given"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_base_may_have_another_floating_point_type(kept, given, tmp_path):
    kept, given = getattr(torch, kept), getattr(torch, given)
    base = clip_vit().eval()
    encoder = wrapped(copy.deepcopy(base).to(kept))
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    loaded = covft.load(tmp_path, copy.deepcopy(base).to(given), WIDTH)
    for name, tensor in encoder.adapted_state_dict().items():
        here = loaded.vit.state_dict()[name]
        assert here.dtype == given
        assert torch.equal(here, tensor.to(given))
    images, text = inputs(given)
    assert features(loaded(images, text)).isfinite().all()


@pytest.mark.parametrize("change", ["one value", "other weights", "other width", "other weights, other type"])
def test_other_base_weights_are_refused_and_the_vit_stays_as_it_was(saved, change):
    _, base, folder = saved
    vit = copy.deepcopy(base)
    if change == "one value":
        with torch.no_grad():
            vit.get_parameter(next(n for n, _ in vit.named_parameters() if "layers.3.mlp.fc1.weight" in n))[0, 0] += (
                1e-3
            )
    else:
        vit = clip_vit(hidden_size=32) if "width" in change else clip_vit()
        vit = vit.to(torch.bfloat16) if "type" in change else vit
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="made for other base weights") as caught:
        covft.load(folder, vit, WIDTH)
    assert "CLIPVisionModel" in str(caught.value)
    assert_unchanged(vit, before)


def test_the_original_ffns_and_norms_are_part_of_the_fingerprint(saved):
    """The FFN of an adapted block, which the wrapped ViT no longer has, and a norm that has moved."""
    _, base, folder = saved
    for part in ("layers.1.mlp.fc2.bias", "layers.0.layer_norm1.weight"):
        vit = copy.deepcopy(base)
        with torch.no_grad():
            vit.get_parameter(next(n for n, _ in vit.named_parameters() if part in n))[0] += 1e-3
        with pytest.raises(CheckpointError, match="made for other base weights"):
            covft.load(folder, vit, WIDTH)


def rewritten(folder, change):
    """Write the same folder with other tensors."""
    tensors, config = read_folder(folder)
    for part in ("format", "weights"):
        config.pop(part)
    change(tensors, config)
    write_folder(folder, tensors, config, "")


def test_every_missing_and_unexpected_tensor_is_named_and_the_vit_stays_as_it_was(saved):
    _, base, folder = saved
    names = sorted(read_folder(folder)[0])
    gone, renamed, reshaped = names[::5], names[1], names[2]

    def change(tensors, config):
        for name in gone:
            del tensors[name]
        tensors["somewhere.else"] = tensors.pop(renamed)
        tensors["blocks.99.mlp"] = torch.zeros(1)
        tensors[reshaped] = tensors[reshaped][None]

    rewritten(folder, change)
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="not those of this encoder") as caught:
        covft.load(folder, vit, WIDTH)
    missing, unexpected, shapes = re.fullmatch(
        r"missing: (.*); unexpected: (.*); other shapes: (.*)", caught.value.got
    ).groups()
    assert missing.split(", ") == sorted([*gone, renamed])
    assert unexpected.split(", ") == ["blocks.99.mlp", "somewhere.else"]
    assert shapes.startswith(f"{reshaped} (1, ")
    assert_unchanged(vit, before)


def test_text_features_of_another_width_are_refused_and_the_vit_stays_as_it_was(saved):
    _, base, folder = saved
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="other shapes"):
        covft.load(folder, vit, WIDTH * 2)
    assert_unchanged(vit, before)


def test_a_damaged_folder_leaves_the_vit_as_it_was(saved):
    _, base, folder = saved
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="cut short"):
        covft.load(folder, vit, WIDTH)
    assert_unchanged(vit, before)


def test_a_wrapped_vit_is_refused(saved):
    encoder, _, folder = saved
    with pytest.raises(UnsupportedViTError, match="wrapped already"):
        covft.load(folder, encoder.vit, WIDTH)


@pytest.mark.parametrize("tower", TOWERS)
def test_unwrap_after_load_gives_the_base_back_bit_for_bit(tower, tmp_path):
    base = TOWERS[tower]().eval()
    trained(wrapped(copy.deepcopy(base).train())).save_pretrained(tmp_path)
    vit = copy.deepcopy(base)
    images, _ = inputs()
    before = snapshot(vit)
    assert covft.unwrap(covft.load(tmp_path, vit, WIDTH)) is vit
    assert_unchanged(vit, before)
    with torch.no_grad():
        assert torch.equal(features(vit(images)), features(base(images)))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a base ViT into a cache of the Hub, as the repository me/base."""

    def put() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        clip_vit().save_pretrained(tmp_path / "base")
        put_in_cache(tmp_path / "cache", "me/base", tmp_path / "base")

    use_cache(monkeypatch, tmp_path / "cache")
    put()
    return put


def test_the_base_is_built_from_its_source(tmp_path, hub):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit = transformers.CLIPVisionModel.from_pretrained("me/base")
    encoder = covft.wrap(vit, HashTextEncoder(WIDTH), layers=(1, 2), experts=2)
    perturb(encoder)
    encoder.save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "covft_config.json").read_text(encoding="utf-8"))
    assert config["base"]["source"] == "hf:me/base"
    assert config["text"]["source"] == f"hash:{WIDTH}"
    loaded = covft.load(tmp_path / "run", text_encoder=HashTextEncoder(WIDTH))
    assert type(loaded.vit) is transformers.CLIPVisionModel
    images, texts = torch.randn(2, 3, 32, 32), ["left?", "right?"]
    with torch.no_grad():
        output = encoder.eval()(images, texts).last_hidden_state
        assert torch.equal(loaded.eval()(images, texts).last_hidden_state, output)


def test_a_base_that_changed_at_its_source_is_refused(tmp_path, hub):
    wrapped(transformers.CLIPVisionModel.from_pretrained("me/base")).save_pretrained(tmp_path / "run")
    hub()
    with pytest.raises(CheckpointError, match="made for other base weights"):
        covft.load(tmp_path / "run", text_encoder=WIDTH)


def test_a_base_from_a_local_folder_must_be_given_and_its_path_is_not_saved(tmp_path):
    clip_vit().save_pretrained(tmp_path / "my base")
    vit = transformers.CLIPVisionModel.from_pretrained(tmp_path / "my base")
    wrapped(vit).save_pretrained(tmp_path / "run")
    for file in ("covft_config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "run" / file).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run" / "covft_config.json").read_text())["base"]["source"] == "local:my base"
    with pytest.raises(CheckpointError, match="in a folder of the machine that saved: 'my base'") as caught:
        covft.load(tmp_path / "run", text_encoder=WIDTH)
    assert "covft.load(folder, vit=...)" in caught.value.fix
    covft.load(tmp_path / "run", load_vit(f"hf:{tmp_path / 'my base'}"), WIDTH)


def test_a_base_without_a_source_must_be_given(saved):
    with pytest.raises(
        CheckpointError, match=r"does not name the source of its base ViT \(transformers CLIPVisionModel\)"
    ):
        covft.load(saved[2], text_encoder=WIDTH)


def test_a_text_encoder_without_a_source_must_be_given(tmp_path):
    base = clip_vit()
    encoder = covft.wrap(copy.deepcopy(base), Words(), layers=(1, 2), experts=2)
    encoder.save_pretrained(tmp_path)
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="cannot be built from its name") as caught:
        covft.load(tmp_path, vit)
    assert caught.value.fix == f"covft.load(folder, text_encoder={WIDTH})"
    assert_unchanged(vit, before)


def test_features_need_no_text_encoder(saved):
    encoder, base, folder = saved
    loaded = covft.load(folder, copy.deepcopy(base))
    assert loaded.text_dim == WIDTH
    images, text = inputs()
    with torch.no_grad():
        assert torch.equal(features(loaded(images, text)), features(encoder(images, text)))


def test_routing_without_text_needs_no_text_encoder(tmp_path):
    base = timm_vit().eval()
    encoder = covft.wrap(copy.deepcopy(base), None, layers=(1, 2), experts=2, context="image")
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    images, _ = inputs()
    loaded = covft.load(tmp_path, copy.deepcopy(base))
    with torch.no_grad():
        assert torch.equal(loaded(images), encoder(images))


def test_a_repository_that_cannot_be_reached_is_named():
    with pytest.raises(CheckpointError, match="not a folder here, and cannot be fetched") as caught:
        covft.load("someone/no-such-encoder", timm_vit(), WIDTH)
    assert "hf download someone/no-such-encoder" in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        covft.load(tmp_path / "nowhere", timm_vit(), WIDTH)


def test_another_text_encoder_of_the_same_width_gives_a_warning(tmp_path):
    class Other(HashTextEncoder):
        def __init__(self) -> None:
            super().__init__(WIDTH)
            self.name = "other"

    base = timm_vit()
    covft.wrap(copy.deepcopy(base), HashTextEncoder(WIDTH)).save_pretrained(tmp_path)
    covft.load(tmp_path, copy.deepcopy(base), HashTextEncoder(WIDTH))
    covft.load(tmp_path, copy.deepcopy(base), WIDTH)
    with pytest.warns(UserWarning, match=r"trained with the text encoder .* loaded with 'other'"):
        covft.load(tmp_path, copy.deepcopy(base), Other())


@pytest.mark.parametrize("name", ["../typo", "./typo", "a--b/c", "a..b/c", "-x/y", "a/b/c"])
@pytest.mark.parametrize("load", [covft.load, covft.load_model])
def test_what_no_repository_can_be_called_is_a_missing_folder(load, name):
    with pytest.raises(CheckpointError, match="no such folder"):
        load(name)
