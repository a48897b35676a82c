"""A method of one's own, and what the registry refuses."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import covft
from covft.errors import CheckpointError, ConfigError, UnsupportedViTError
from covft.tuning import Change, Method, load, methods, registry, tune, untune
from tests.helpers.tuned import answer, tower_of


@dataclass(frozen=True, kw_only=True)
class ClassToken(Method):
    """Train the class token alone."""

    name: ClassVar[str] = "class_token"
    merges: ClassVar[bool] = True

    def plan(self, tower):
        return Change(trained=("cls_token",))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    registry.register_method(ClassToken)


def test_a_method_of_ones_own_is_used_like_any_other(registered, tmp_path):
    tower, vit = tower_of("timm-clip")
    images = tower.images(3)
    tuned = tune(vit, "class_token")
    assert [name for name, p in vit.named_parameters() if p.requires_grad] == ["cls_token"]
    with torch.no_grad():
        vit.cls_token.add_(1)
    output = answer(tuned, tower, images)
    tuned.save_pretrained(tmp_path)
    assert torch.equal(answer(load(tmp_path, vit=untune(tuned)), tower, images), output)


def test_a_folder_of_a_method_that_is_not_here_says_so(registered, tmp_path, monkeypatch):
    _, vit = tower_of("timm-clip")
    tune(vit, "class_token").save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(CheckpointError, match="method"):
        load(tmp_path, vit=tower_of("timm-clip")[1])


def test_other_base_weights_are_refused(tmp_path):
    _, vit = tower_of("timm-clip")
    tune(vit, "bitfit").save_pretrained(tmp_path)
    _, other = tower_of("timm-clip")
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="base weights"):
        load(tmp_path, vit=other)
    untune(tune(other, "bitfit"))


def test_unknown_methods_name_the_closest():
    _, vit = tower_of("timm-clip")
    with pytest.raises(ConfigError, match=r"covft.tune\(vit, 'lora'\)"):
        tune(vit, "lorra")


def test_names_are_taken_once(registered):
    with pytest.raises(ConfigError, match="already"):
        registry.register_method(ClassToken)
    with pytest.raises(ConfigError, match="not a tuning method"):
        registry.register_method(dict)
    assert "class_token" in methods()


def test_a_tuned_tower_is_not_tuned_again():
    _, vit = tower_of("timm-clip")
    tuned = tune(vit, "bitfit")
    for whole in (vit, tuned):
        with pytest.raises(UnsupportedViTError, match="already, by 'bitfit'"):
            tune(whole, "full")
        with pytest.raises(UnsupportedViTError, match="already, by 'bitfit'"):
            covft.wrap(whole, 16)
    untune(tuned)
    tune(vit, "full")


def test_a_wrapped_tower_is_not_tuned():
    _, vit = tower_of("timm-clip")
    encoder = covft.wrap(vit, 16)
    for whole in (vit, encoder):
        with pytest.raises(UnsupportedViTError, match="wrapped already"):
            tune(whole, "lora")
    covft.unwrap(encoder)
