"""Hidden states of skipped blocks are never read: all ways to ask for one are refused before the tower runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from covft.errors import ConfigError
from covft.integrations import attach, detach, get_encoder
from tests.helpers.attached import CUP, TEXTS, attached
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.towers import image_features

pytestmark = pytest.mark.usefixtures("quiet")
# After feature_layer=-2 of four blocks, or up to it; -5 are the embeddings.
TOO_LATE = [-1, 4, [-1], [-3, -1], [2, 4]]
FINE = [-2, 3, 1, -5]


def ways(model, batch, layer):
    """Calls that read a layer, by what they are."""
    pixels, asked = batch.inputs["pixel_values"], {"vision_feature_layer": layer}
    inside = get_encoder(model).condition("what?")
    yield "forward", lambda: model(**batch.inputs, **asked)
    yield "forward of the base", lambda: model.base_model(**batch.inputs, **asked)
    yield "generate", lambda: model.generate(**batch.inputs, **asked, max_new_tokens=1, do_sample=False)
    yield "features with a text", lambda: model.get_image_features(pixels, context_text="what?", **asked)
    yield "positional", lambda: model.get_image_features(pixels, layer, context_text="what?")
    yield "features in a condition", lambda: within(inside, lambda: model.get_image_features(pixels, **asked))
    base = model.base_model
    yield "features of the base", lambda: within(inside, lambda: base.get_image_features(pixels, **asked))


def within(condition, call):
    with condition:
        return call()


@pytest.fixture
def runs():
    """Count the runs of a tower."""
    counted = []
    return counted, lambda model: get_encoder(model).vit.register_forward_pre_hook(lambda *_: counted.append(1))


@pytest.mark.parametrize("layer", TOO_LATE, ids=str)
def test_layers_after_the_one_that_is_read__are_refused_before_compute(layer, runs):
    model, batch = attached("llava", [Row(1, CUP)], layers=[0, 1], feature_layer=-2)
    counted, count = runs
    count(model)
    for number in range(7):
        name, call = list(ways(model, batch, layer))[number]
        with pytest.raises(ConfigError, match="would skip blocks that the model reads"), torch.no_grad():
            call()
        assert not counted, name
    model.config.vision_feature_layer = layer
    for number in range(7):
        name, call = list(ways(model, batch, None))[number]
        with pytest.raises(ConfigError, match="would skip"), torch.no_grad():
            call()
        assert not counted, name


@pytest.mark.parametrize("layer", FINE, ids=str)
def test_earlier_layers_are_what_a_plain_model_reads(layer):
    mllm = BY_NAME["llava"]
    model = mllm.build()
    pixels = mllm.batch(model, [Row(1, CUP)]).inputs["pixel_values"]
    with torch.no_grad():
        wanted = image_features(model.get_image_features(pixels, vision_feature_layer=layer))
        attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0, 1], feature_layer=-2)
        found = image_features(model.get_image_features(pixels, vision_feature_layer=layer, context_text="what?"))
    torch.testing.assert_close(found, wanted)


def test_without_feature_layer__every_layer_can_be_read():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, [Row(1, CUP)])
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    for number in range(7):
        _, call = list(ways(model, batch, -1))[number]
        with torch.no_grad():
            call()


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "vipllava"])
def test_of_other_models(name):
    mllm = BY_NAME[name]
    model = mllm.build()
    batch = mllm.batch(model, [Row(1, CUP)])
    several = name == "vipllava"
    model.config.vision_feature_layer = [-2] if several else -2
    attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0], feature_layer=-2)
    with pytest.raises(ConfigError, match="would skip"), torch.no_grad():
        model(**batch.inputs, vision_feature_layer=[-2, -1] if several else -1)
    if name == "llava_onevision":
        for part in (model, model.base_model):
            with pytest.raises(ConfigError, match="would skip"), get_encoder(model).condition("what?"):
                part.get_video_features(torch.randn(1, 2, 3, 32, 32), vision_feature_layer=-1)


def test_copies_keep_the_check__and_detach_removes_it():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    pixels = torch.randn(1, 3, 32, 32)
    attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0, 1], feature_layer=-2)
    copied = copy.deepcopy(model)
    for one in (model, copied, pickle.loads(pickle.dumps(model))):
        with pytest.raises(ConfigError, match="would skip"), get_encoder(one).condition(torch.zeros(1, 16)):
            one.model.get_image_features(pixels, vision_feature_layer=-1)
    detach(copied)
    assert not {"forward", "generate", "get_image_features"} & {*vars(copied), *vars(copied.model)}
    with torch.no_grad():
        copied.get_image_features(pixels, vision_feature_layer=-1)
    with pytest.raises(ConfigError, match="would skip"):
        model.get_image_features(pixels, vision_feature_layer=-1, context_text="what?")
