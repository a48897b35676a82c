"""Names of transformers by release: one name in saved folders for all, and refusals where a name has gone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import covft
from covft.adapters.sources import load_vit
from covft.errors import UnsupportedVersionError
from covft.integrations.mllm.attachment import attachment_of
from covft.utils import transformers_names as names
from tests.helpers.checkpoints import TOWERS
from tests.helpers.releases import found, trained

transformers = pytest.importorskip("transformers")

# Tensors of towers with one layer, as releases 4.49 to 5.24 name them (weights and biases of a layer alike).
GOLDEN = json.loads((Path(__file__).parent / "golden" / "tower_names.json").read_text(encoding="utf-8"))


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def of_class(name: str, module: str = "transformers.models.some") -> nn.Module:
    return type(name, (nn.Module,), {"__module__": module})()


# ------------------------------------------------------------------------------- names of tensors


@pytest.mark.parametrize("kind", GOLDEN)
def test_saved_names__are_those_of_the_newest_release_in_all_releases(kind):
    saved = names.saved_names(of_class(kind))
    *_, newest = GOLDEN[kind].values()
    assert any("5.24" in releases.split() for releases in GOLDEN[kind])
    for releases, own in GOLDEN[kind].items():
        assert sorted(map(saved, own)) == sorted(newest), releases
        assert [saved(saved(name)) for name in own] == [saved(name) for name in own]


@pytest.mark.parametrize("kind", GOLDEN)
def test_saved_names__know_the_installed_release(kind):
    """A release that renames tensors of a tower fails here: then the names it has need a rule."""
    vit = found(kind)(found(kind).config_class(**SMALL))
    own = [name for name in vit.state_dict() if ".0." not in name or not name.endswith("bias")]
    *_, newest = GOLDEN[kind].values()
    assert set(newest) <= set(map(names.saved_names(vit), own))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder.layer.3.intermediate.router.gate.weight", "layers.3.mlp.router.gate.weight"),
        ("encoder.layer.3.intermediate.experts.1.intermediate.dense.bias", "layers.3.mlp.experts.1.fc1.bias"),
        ("encoder.layer.3.intermediate.experts.1.output.dense.bias", "layers.3.mlp.experts.1.fc2.bias"),
        ("encoder.layer.3.intermediate.experts.shared.output.dense.bias", "layers.3.mlp.experts.shared.fc2.bias"),
        ("encoder.layer.3.intermediate.experts.differences.1.up", "layers.3.mlp.experts.differences.1.up"),
        (
            "encoder.layer.3.intermediate.context.attention.out_proj.weight",
            "layers.3.mlp.context.attention.out_proj.weight",
        ),
        ("encoder.layer.3.layernorm_before.weight", "layers.3.layernorm_before.weight"),
    ],
)
def test_saved_names__of_an_ffn_in_two_halves(old, new):
    assert names.saved_names(of_class("ViTModel"))(old) == new


def test_saved_names__are_those_of_the_module_where_no_release_renamed_it():
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    for vit in (
        of_class("CLIPVisionModelWithProjection"),
        of_class("CLIPVisionModel", "mylib"),
        covft.testing.ToyViT(),
    ):
        assert names.saved_names(vit)(name) == name
    own = type("Tower", (type(of_class("CLIPVisionModel")),), {"__module__": "mylib"})()
    assert names.saved_names(own)(name) == name.removeprefix("vision_model.")


# ------------------------------------------------------------------------------------ self-checks


@trained
def test_check_release__refuses_an_older_transformers(monkeypatch):
    names.check_release("attach()")
    for version in ("4.56.2", "4.49.0", "3.5", "4.9.1"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(UnsupportedVersionError, match="attach\\(\\) does not work") as caught:
            names.check_release("attach()")
        assert caught.value.got == f"transformers {version}"
        assert caught.value.expected.startswith("transformers 4.57 or later")
        assert "transformers>=4.57" in caught.value.fix
    for version in ("4.57.0", "5.0.0rc1", "10.2"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        names.check_release("attach()")


@trained
def test_older_transformers__are_refused_by_attach_callback_and_trainer(monkeypatch):
    model = covft.testing.tiny_llava().model

    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.2")
    with pytest.raises(UnsupportedVersionError, match=r"4\.57"):
        covft.attach(model, 8, tokenizer=None)
    assert attachment_of(model) is None
    with pytest.raises(UnsupportedVersionError, match=r"4\.57"):
        covft.CoVFTCallback()
    name = "covft.integrations.training.trainer"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UnsupportedVersionError, match=r"4\.57"):
        importlib.import_module(name)
    assert covft.wrap(TOWERS["clip"](), 8).layers


@trained
@pytest.mark.parametrize("name", names._OF_TRAINER)
def test_check_trainer__refuses_a_trainer_without_a_method(name, monkeypatch):
    names.check_trainer()
    monkeypatch.delattr(transformers.Trainer, name)
    with pytest.raises(UnsupportedVersionError, match=f"without Trainer.{name}") as caught:
        names.check_trainer()
    assert transformers.__version__ in caught.value.got


def test_training_field__refuses_arguments_without_one(monkeypatch):
    assert names.training_field() in transformers.TrainingArguments.__dataclass_fields__
    monkeypatch.setattr(names, "CHECKPOINTING", ("recomputation",))
    with pytest.raises(UnsupportedVersionError, match="without recomputation"):
        names.training_field()


@pytest.mark.parametrize("name", [*names._OF_DEEPSPEED, "_hf_deepspeed_config_weak_ref"])
def test_deepspeed_integration__refuses_one_without_a_name(name, monkeypatch):
    import transformers.integrations.deepspeed as integration

    assert names.deepspeed_integration() is None
    monkeypatch.delattr(integration, name)
    with pytest.raises(UnsupportedVersionError, match=f"without {name}"):
        names.deepspeed_integration()
    monkeypatch.delitem(sys.modules, "transformers.integrations.deepspeed")
    assert names.deepspeed_integration() is None


def test_from_config__refuses_classes_without_it():
    with pytest.raises(UnsupportedVersionError, match="without _from_config"):
        names.from_config(SimpleNamespace(), None, {})


def test_loading_options__name_the_type_as_the_release_does(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.55.4")
    assert names.loading_options({"dtype": "auto", "revision": "main"}) == {"torch_dtype": "auto", "revision": "main"}
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.0")
    assert names.loading_options({"dtype": "auto"}) == {"dtype": "auto"}


def test_loading_options__are_those_of_the_installed_release(tmp_path):
    TOWERS["clip"]().half().save_pretrained(tmp_path)
    vit = load_vit(f"hf:{tmp_path}")
    assert vit.dtype == torch.float16
    assert load_vit(f"hf:{tmp_path}", dtype=torch.float64).dtype == torch.float64
    random = load_vit(f"hf:{tmp_path}", pretrained=False, dtype=torch.bfloat16)
    assert random.dtype == torch.bfloat16


def test_commit_of__is_read_where_it_is():
    assert names.commit_of(SimpleNamespace(config=SimpleNamespace(_commit_hash="abc"))) == "abc"
    assert names.commit_of(SimpleNamespace(config=SimpleNamespace())) is None
    assert names.commit_of(nn.Linear(1, 1)) is None
