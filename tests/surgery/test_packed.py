"""Quantised towers: packed FFNs are refused before anything changes, in every form that libraries pack them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import covft
from covft.errors import UnsupportedViTError
from covft.integrations.mllm.families import find_tower
from covft.testing import HashTextEncoder, tiny_llava
from tests.helpers.releases import trained
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.tiny_vits import HALVES, Halves
from tests.helpers.towers import BY_NAME, body, features

IN, OUT = 6, 4


class GPTQ(nn.Module):
    """As GPTQ and AWQ keep a layer: packed integers and floating-point scales, all of them buffers."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("qweight", torch.zeros(IN // 2, OUT, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, OUT))
        self.bias = nn.Parameter(torch.zeros(OUT))


class HQQ(nn.Module):
    """As HQQ, AQLM and compressed-tensors: integers as a parameter."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.W_q = nn.Parameter(torch.zeros(OUT, IN // 2, dtype=torch.uint8), requires_grad=False)


class Lazy(nn.Parameter):
    """As bitsandbytes before it moves to a GPU: still floating-point, and packed at the first `.to`."""


def float8():
    layer = nn.Linear(IN, OUT)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def lazy():
    layer = nn.Linear(IN, OUT)
    layer.weight = Lazy(layer.weight.detach())
    return layer


@pytest.mark.parametrize("pack", [GPTQ, HQQ, float8, lazy], ids=["gptq", "hqq", "float8", "lazy"])
@pytest.mark.parametrize(
    ("build", "path", "options"),
    [
        (BY_NAME["timm-clip"].build, "blocks.1.mlp.fc2", {}),
        (BY_NAME["hf-clip"].build, "encoder.layers.1.mlp.fc1", {}),
        (lambda: Halves(residual=True), "layer.1.output.dense", {"adapter": HALVES}),
    ],
    ids=["timm", "hf", "second-half"],
)
def test_packed__is_refused_and_nothing_changed(build, path, options, pack):
    vit = build()
    path = next(name for name, _ in vit.named_modules() if name.endswith(path))
    vit.set_submodule(path, pack())
    before = snapshot(vit)
    with pytest.raises(UnsupportedViTError, match=f"weights of {re.escape(path)} are packed") as caught:
        covft.wrap(vit, 8, layers=[0, 1], **options)
    assert "llm_int8_skip_modules" in str(caught.value)
    assert_unchanged(vit, before)
    covft.wrap(vit, 8, layers=[0], **options)  # the FFN of block 1 stays frozen, so it may be packed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_packed__layers_for_inference_alone_are_refused_anywhere():
    vit: Any = BY_NAME["timm-clip"].build()
    vit.blocks[3].attn = torch.ao.quantization.quantize_dynamic(vit.blocks[3].attn, {nn.Linear}, dtype=torch.qint8)
    mlp, trained = vit.blocks[1].mlp, [p.requires_grad for p in vit.parameters()]
    with pytest.raises(UnsupportedViTError, match=r"blocks.3.attn.qkv is a layer of torch for inference alone"):
        covft.wrap(vit, 8, layers=[1])
    assert vit.blocks[1].mlp is mlp
    assert [p.requires_grad for p in vit.parameters()] == trained


def test_packed__an_integer_buffer_beside_weights_is_no_weight():
    vit: Any = BY_NAME["timm-clip"].build()
    vit.blocks[1].mlp.fc1.register_buffer("order", torch.zeros(3, 3, dtype=torch.long))
    covft.wrap(vit, 8, layers=[1])


@trained
def test_packed__attach_names_the_tower_as_transformers_wants_it():
    tiny: Any = tiny_llava()
    tower = find_tower(tiny.model)[0]
    body(tower).encoder.layers[2].mlp.fc1 = HQQ()
    before = snapshot(tiny.model)
    with pytest.raises(UnsupportedViTError, match=r'llm_int8_skip_modules=\["model.vision_tower", "lm_head"\]'):
        covft.attach(tiny.model, HashTextEncoder(8), tokenizer=tiny.tokenizer, layers=[2])
    assert_unchanged(tiny.model, before)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes__a_packed_tower_is_refused_and_a_skipped_one_trains(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    def load(skipped):
        options = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": skipped}
        config = BitsAndBytesConfig(**options)
        return LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")

    tiny = tiny_llava()
    tiny.model.save_pretrained(tmp_path)
    texts = HashTextEncoder(8)
    with pytest.raises(UnsupportedViTError, match="are packed") as caught:
        covft.attach(load(None), texts, tokenizer=tiny.tokenizer)
    fix = re.search(r"llm_int8_skip_modules=\[(.*)\]", str(caught.value))
    assert fix is not None
    model = load([name.strip(' "') for name in fix[1].split(",")])
    assert type(model.model.language_model.layers[0].mlp.up_proj) is not nn.Linear
    covft.attach(model, texts, tokenizer=tiny.tokenizer)
    model.train()
    model(**tiny.batch(["what?", "who?"], images=[1, 1], answers=["a", "b"])).loss.backward()
    assert all(p.grad is not None for p in covft.get_encoder(model).trainable_parameters())


@pytest.mark.slow
def test_torchao__packed_ffns_are_refused_and_packed_attention_trains():
    quantization = pytest.importorskip("torchao.quantization")
    vit: Any = BY_NAME["timm-clip"].build()
    quantization.quantize_(vit, quantization.Int8WeightOnlyConfig(), lambda m, name: ".mlp.fc" in name)
    with pytest.raises(UnsupportedViTError, match="are packed"):
        covft.wrap(vit, 16, layers=[1])
    vit: Any = BY_NAME["timm-clip"].build()
    quantization.quantize_(vit, quantization.Int8WeightOnlyConfig(), lambda m, name: name.endswith("attn.proj"))
    encoder = covft.wrap(vit, 16, layers=[1])
    features(encoder(BY_NAME["timm-clip"].images(2), torch.rand(2, 16))).sum().backward()
    assert all(p.grad is not None for p in encoder.trainable_parameters())
