"""InternViT in OpenGVLab's own layout."""

import inspect

import pytest
import torch

from covft.adapters.internvit import convert
from covft.adapters.sources import load_vit, source_of
from covft.errors import CheckpointError
from tests.helpers.building import SIZE, WIDTH, published, published_forward, save_published
from tests.helpers.releases import found


@pytest.fixture(autouse=True)
def _has_internvit(request):
    if "load_vit" in inspect.getsource(request.function):
        found("InternVLVisionModel")


@pytest.mark.parametrize(("qk_norm", "norm"), [(False, "layer_norm"), (True, "rms_norm")], ids=["300M", "6B"])
def test_internvit_as_published_is_read(tmp_path, qk_norm, norm):
    tensors, config = published(qk_norm, norm)
    save_published(tmp_path, tensors, config, files=2)  # as the large ones are
    vit = load_vit(f"hf:{tmp_path}", dtype=torch.float64)
    assert type(vit).__name__ == "InternVLVisionModel"
    images = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    expected = published_forward(tensors, images, qk_norm, norm)
    # transformers' RMSNorm computes in float32
    torch.testing.assert_close(vit(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in vit.parameters())
    assert all(p.requires_grad for p in vit.parameters())
    assert not vit.training
    assert source_of(vit) == f"hf:{tmp_path}"
    assert load_vit(source_of(vit), attn_implementation="eager").config._attn_implementation == "eager"


def test_its_config_is_enough_for_random_weights(tmp_path):
    save_published(tmp_path, {}, published()[1])
    vit = load_vit(f"hf:{tmp_path}", pretrained=False, device="meta")
    assert next(vit.parameters()).is_meta
    assert source_of(vit) is None


def test_a_subfolder_is_read(tmp_path):
    tensors, config = published()
    save_published(tmp_path / "vision", tensors, config)
    vit = load_vit(f"hf:{tmp_path}", subfolder="vision")
    assert torch.equal(vit.encoder.layer[1].lambda_2, tensors["encoder.layers.1.ls2"])


def test_internvit_with_other_tensors_is_refused(tmp_path):
    tensors, config = published()
    scale = tensors.pop("encoder.layers.1.ls2")
    save_published(tmp_path / "fewer", tensors, config)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.lambda_2"):
        load_vit(f"hf:{tmp_path / 'fewer'}")
    save_published(
        tmp_path / "more", {**tensors, "encoder.layers.1.ls2": scale, "encoder.layers.9.ls2": scale.clone()}, config
    )
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.9\.lambda_2"):
        load_vit(f"hf:{tmp_path / 'more'}")


def test_conversion_keeps_every_tensor():
    tensors, _ = published(qk_norm=True)
    state = convert(tensors)
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in tensors.values())
    q, k, v = tensors["encoder.layers.0.attn.qkv.bias"].split(WIDTH)
    for part, tensor in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(state[f"encoder.layer.0.attention.{part}_proj.bias"], tensor)
