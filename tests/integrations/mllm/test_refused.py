"""What attach() and an attached model refuse."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import covft
from covft.errors import (
    ConfigError,
    ShapeError,
    UnsupportedViTError,
)
from covft.integrations import attach, detach, get_encoder
from tests.helpers.attached import CUP, TEXTS, alone, attached, changed, forward
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.releases import found

pytestmark = pytest.mark.usefixtures("quiet")


def test_refused__and_nothing_is_changed():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    with pytest.raises(UnsupportedViTError, match="is not attached"):
        get_encoder(model)
    with pytest.raises(UnsupportedViTError, match="is not attached"):
        detach(model)
    with pytest.raises(ConfigError, match="turns='second'"):
        attach(model, TEXTS, tokenizer=mllm.tokenizer, turns="second")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        attach(model, TEXTS, tokenizer="a name")
    with pytest.raises(covft.errors.LayerIndexError):
        attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[9])
    with pytest.raises(ConfigError, match="saved tower has its own settings"):
        attach(model, TEXTS, tokenizer=mllm.tokenizer, experts=2, pretrained="somewhere")
    assert inspect.ismethod(model.forward)
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    with pytest.raises(UnsupportedViTError, match="attached already"):
        attach(model, TEXTS, tokenizer=mllm.tokenizer)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_refused__blocks_after_what_the_model_reads(name):
    mllm = BY_NAME[name]
    model = mllm.build()
    depth = model.config.vision_config.num_hidden_layers
    assert model.config.vision_feature_layer == -2
    for layers in ([depth - 1], range(depth), [-1]):
        with pytest.raises(covft.errors.LayerIndexError, match="after the hidden state that is read") as error:
            attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=layers)
        assert f"up to {depth - 2}" in str(error.value)
    model.config.vision_feature_layer = -3
    assert max(get_encoder(attach(model, TEXTS, tokenizer=mllm.tokenizer)).layers) <= depth - 3
    detach(model)
    model.config.vision_feature_layer = -1
    assert get_encoder(attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[depth - 1])).layers == (depth - 1,)


def test_refused__models_without_a_tower_that_can_be_served():
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(UnsupportedViTError, match="not a model of transformers"):
        attach(nn.Linear(2, 2), TEXTS, tokenizer=None)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UnsupportedViTError, match="no vision tower"):
        attach(LlamaForCausalLM(LlamaConfig(vocab_size=32, **small)), TEXTS, tokenizer=None)
    towerless = BY_NAME["llava"].build()
    towerless.model.vision_tower = nn.Linear(2, 2)
    with pytest.raises(UnsupportedViTError, match="covft cannot wrap"):
        attach(towerless, TEXTS, tokenizer=None)


def test_refused__a_tower_whose_argument_of_sizes_is_not_known():
    kind, config = found("MiniCPMV4_6ForConditionalGeneration"), found("MiniCPMV4_6Config")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        text = {**small, "model_type": "qwen3_5_text", "vocab_size": 32}
        packed = kind(config(vision_config=small, text_config=text))
    with pytest.raises(UnsupportedViTError, match="target_sizes="):
        attach(packed, TEXTS, tokenizer=None)


def test_refused__images_without_any_placeholder():
    model, batch = attached("llava")
    ids = batch.inputs["input_ids"]
    with pytest.raises(ShapeError, match="is unknown"):
        forward(model, batch, input_ids=ids.where(ids != model.config.image_token_id, 0))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_refused__images_that_belong_to_no_row(name):
    model, batch = attached(name)
    mllm = BY_NAME[name]
    ids = batch.inputs["input_ids"].clone()
    image = mllm.tokenizer.convert_tokens_to_ids("<image>")
    ids[0, (ids[0] == image).nonzero()[0]] = mllm.tokenizer.pad_token_id
    with pytest.raises(ShapeError, match="is unknown"):
        forward(model, batch, input_ids=ids)
    # In a single row there is nothing to find out; the model itself sees the mistake.
    one = {key: value[-2:] for key, value in batch.inputs.items() if key in ("pixel_values", "image_sizes")}
    cut = batch.inputs["input_ids"][2:].clone()
    cut[0, (cut[0] == image).nonzero()[0]] = mllm.tokenizer.pad_token_id
    with pytest.raises(ValueError, match="do not match"):
        model(**one, input_ids=cut)
    if name == "llava_next":
        with pytest.raises(ShapeError, match="have no image_sizes"):
            model(input_ids=ids, pixel_values=batch.inputs["pixel_values"])
        more = {key: torch.cat([batch.inputs[key], batch.inputs[key][:1]]) for key in ("pixel_values", "image_sizes")}
        with pytest.raises(ShapeError, match="is unknown"):
            forward(model, batch, **more)


def test_refused__rows_that_are_packed_from_several_samples():
    model, batch = attached("llava", [Row(1, CUP), Row(1, "a dog?")])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "attention_mask": None,
    }
    with pytest.raises(ShapeError, match="packed"):
        forward(model, batch, **packed)
    _, runs = forward(model, batch, **packed, context_text=[CUP, "a dog?"])
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP, "a dog?"])))
    # Positions that only leave out the padding say nothing of the kind.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert (positions == 0).sum(1).max() > 1
    _, runs = forward(model, batch, position_ids=positions)
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP, "a dog?"])))


def test_refused__images_of_another_shape():
    model, batch = attached("llava")
    with pytest.raises(ShapeError, match=r"\(images, 3, H, W\)"):
        forward(model, batch, pixel_values=batch.inputs["pixel_values"][None])
    other, batch = attached("idefics3")
    with pytest.raises(ShapeError, match=r"\(rows, images, 3, H, W\)"):
        forward(other, batch, pixel_values=batch.inputs["pixel_values"][0])
