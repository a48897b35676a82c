"""Configs of model repositories that ask for code or weights of somewhere else."""

from __future__ import annotations

import pytest

from covft.errors import CheckpointError
from covft.utils.foreign_code import refuse_code


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel:forward"},
        {"vision_config": {"attn_implementation": {"": "evil/kernel"}}},
        {"layers": [{"experts_implementation": "evil/kernel"}]},
        {"model_args": {"weights_only": False}},
        {"model_kwargs": {"trust_remote_code": True}},
        {"tokenizer_args": {"trust_remote_code": True}},
        {"config_kwargs": {"use_kernels": True}},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:me/evil"},
        {"model_type": "timm_wrapper", "architecture": "local-dir:/data"},
        {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "/data/x.pt"}},
        {"backbone_config": {"model_args": {"pretrained_cfg_overlay": {"url": "http://evil.example"}}}},
    ],
)
def test_refused(config):
    with pytest.raises(CheckpointError, match="asks for code or weights of somewhere else") as caught:
        refuse_code(config, "me/evil")
    assert "me/evil" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        None,
        [],
        {"attn_implementation": "sdpa", "architectures": ["CLIPModel"], "auto_map": {"AutoModel": "x.Y"}},
        {"_attn_implementation": None, "trust_remote_code": True},  # not read by any library
        {"model_type": "timm_wrapper", "architecture": "vit_base_patch16_224", "model_args": {"img_size": 96}},
        {"max_seq_length": 256, "model_args": {"dtype": "float16"}},
    ],
)
def test_accepted(config):
    refuse_code(config, "me/fine")
