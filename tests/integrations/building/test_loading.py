"""The parts that are not towers, and what cannot be loaded."""

import json
import os
import weakref

import pytest
from safetensors.torch import save_file
from torch import nn

from covft.errors import CheckpointError, ConfigError, UnknownViTError, UnsupportedViTError
from covft.integrations import build_llava, load_image_processor, whole_weights
from tests.helpers.building import SIZE, published


def test_the_image_processor_makes_what_the_tower_takes(parts, tmp_path):
    from PIL import Image
    from transformers import BitImageProcessor, SiglipImageProcessor

    picture = Image.new("RGB", (50, 40))
    BitImageProcessor().save_pretrained(parts / "dinov2")  # 256, cropped to 224
    SiglipImageProcessor().save_pretrained(parts / "internvit")  # 224, not cropped
    (tmp_path / "config.json").write_text(json.dumps(published()[1]))
    BitImageProcessor().save_pretrained(tmp_path)
    for source in (parts / "dinov2", parts / "internvit", tmp_path):
        assert load_image_processor(source)(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, SIZE, SIZE)
    assert load_image_processor(parts / "dinov2", 48)(picture)["pixel_values"][0].shape == (3, 48, 48)


def test_what_cannot_be_loaded_says_so(parts, tokenizer):
    with pytest.raises(UnknownViTError, match=r"vision tower .*nowhere"):
        build_llava(parts / "nowhere", parts / "llama", tokenizer)
    with pytest.raises(ConfigError, match=r"language model .*nowhere"):
        build_llava(parts / "clip", parts / "nowhere", tokenizer)
    with pytest.raises(UnknownViTError, match="no vision model"):
        build_llava(parts / "llama", parts / "llama", tokenizer)
    with pytest.raises(ConfigError, match="language model"):
        build_llava(parts / "clip", parts / "clip", tokenizer)
    with pytest.raises(ConfigError, match="not a language model with a head"):
        build_llava(parts / "clip", nn.Linear(2, 2), tokenizer)
    with pytest.raises(ConfigError, match="image processor"):
        load_image_processor(parts / "llama")


def test_missing_weights_are_an_error(parts, tokenizer, tmp_path):
    from safetensors.torch import load_file

    for name, key, error in (
        ("dinov2", "encoder.layer.1.mlp.fc1.weight", UnsupportedViTError),
        ("llama", "model.layers.1.mlp.up_proj.weight", CheckpointError),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((parts / name / "config.json").read_text())
        tensors = load_file(parts / name / "model.safetensors")
        del tensors[key]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        vision, language = (folder, parts / "llama") if name == "dinov2" else (parts / "clip", folder)
        with pytest.raises(error, match=key.replace(".", r"\.").replace("encoder", ".*")):
            build_llava(vision, language, tokenizer)


def test_weights_are_whole_while_they_are_loaded(monkeypatch):
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self):
            return True

    held = Config()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", weakref.ref(held))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert deepspeed.is_deepspeed_zero3_enabled()

    def load_and_fail():
        with whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
            raise KeyError

    with pytest.raises(KeyError):
        load_and_fail()
    assert deepspeed.is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
