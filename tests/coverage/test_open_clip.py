"""open_clip: image towers of every kind inside whole models, whose other side goes on working."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import covft
from benchmarks.coverage.check import check
from covft.errors import UnknownViTError
from tests.helpers.towers import TEXT_DIM, perturb

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
NATIVE = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
DECODER = {**TEXT, "mlp_ratio": 2}


def timm_tower(name: str, size: int, **options: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": size, **options}


def clip() -> nn.Module:
    return open_clip.model.CLIP(embed_dim=16, vision_cfg=NATIVE, text_cfg=TEXT)


def custom_text() -> nn.Module:
    return open_clip.model.CustomTextCLIP(embed_dim=16, vision_cfg=timm_tower("test_vit", 32), text_cfg=TEXT)


def coca() -> nn.Module:
    vision = {**NATIVE, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = open_clip.coca_model.CoCa(embed_dim=16, multimodal_cfg=DECODER, text_cfg=text, vision_cfg=vision)
    for parameter in model.text_decoder.parameters():
        nn.init.normal_(parameter, std=0.1)  # open_clip leaves some as the memory was
    return model


WHOLE = {"CLIP": clip, "CustomTextCLIP": custom_text, "CoCa": coca}


def ids() -> Tensor:
    return torch.randint(1, 60, (3, 8))


@pytest.mark.parametrize("kind", WHOLE)
def test_the_whole_model_goes_on_working(kind):
    model = WHOLE[kind]().double().eval()
    plain, tokens = copy.deepcopy(model), ids()
    images, texts = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.randn(3, TEXT_DIM).double()
    encoder = covft.wrap(model.visual, TEXT_DIM, layers=[0, 1, 2])
    torch.testing.assert_close(model.encode_text(tokens), plain.encode_text(tokens))
    with encoder.condition(texts):
        torch.testing.assert_close(model.encode_image(images), plain.encode_image(images))
    perturb(encoder)
    with encoder.condition(texts):
        first = model.encode_image(images)
    with encoder.condition(texts.flip(0)):
        assert not torch.allclose(model.encode_image(images), first)
    torch.testing.assert_close(model.encode_text(tokens), plain.encode_text(tokens))
    covft.unwrap(encoder)
    assert torch.equal(model.encode_image(images), plain.encode_image(images))


@pytest.mark.parametrize("kind", WHOLE)
def test_gradient_checkpointing_of_the_whole_model_is_exact(kind):
    model = WHOLE[kind]().double().train()
    encoder = covft.wrap(model.visual, TEXT_DIM, layers=[0, 1, 2])
    perturb(encoder)
    images, texts = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.randn(3, TEXT_DIM).double()
    parameters = list(encoder.trainable_parameters())

    def gradients() -> tuple[Tensor | None, ...]:
        with encoder.condition(texts):
            output = model.encode_image(images)
        with encoder.condition(texts.flip(0)):  # open while backward runs, and not what it is about
            return torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)

    wanted = gradients()
    model.set_grad_checkpointing(True)
    found = gradients()
    assert sum(g is not None for g in wanted) > 30
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


def test_coca_writes_captions_as_before():
    model = coca().double().eval()
    plain, tokens = copy.deepcopy(model), ids()
    images, texts = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.randn(3, TEXT_DIM).double()
    encoder = covft.wrap(model.visual, TEXT_DIM, layers=[0, 1])
    with encoder.condition(texts):
        found = model(images, tokens)
    for name, value in plain(images, tokens).items():
        torch.testing.assert_close(found[name], value)


TOWERS = {
    "native": (NATIVE, 3, "BND"),
    "vit": (timm_tower("test_vit", 32), 6, "BND"),
    "fastvit": (timm_tower("fastvit_mci0", 64, timm_pool=""), 2, "BCHW"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", TOWERS)
def test_towers(name):
    vision, depth, layout = TOWERS[name]
    tower = open_clip.model._build_vision_tower(16, vision)
    size = vision["image_size"]
    result = check(tower, lambda n: ((torch.randn(n, 3, size, size),), {}), name=name, library="open_clip")
    assert (result.verdict, result.reason) == ("wrapped", "")
    assert (result.num_blocks, result.layouts) == (depth, [layout])


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        (timm_tower("test_convnext", 32), "TimmModel has no transformer blocks with an FFN: it has no attention"),
        ({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, "ModifiedResNet has no transformer blocks"),
    ],
    ids=["convnext", "resnet"],
)
def test_convnets_are_refused_by_name(vision, reason):
    tower = open_clip.model._build_vision_tower(16, vision)
    with pytest.raises(UnknownViTError, match=reason):
        covft.wrap(tower, TEXT_DIM)


def test_results_are_json():
    tower = open_clip.model._build_vision_tower(16, NATIVE)
    result = check(tower, lambda n: ((torch.randn(n, 3, 32, 32),), {}), name="native", library="open_clip")
    assert json.loads(json.dumps(result.to_dict()))["verdict"] == "wrapped"
