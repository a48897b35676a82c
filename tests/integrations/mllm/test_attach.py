"""attach() and detach(): nothing changes at the start, and everything is given back; copies."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from covft.errors import (
    ConfigError,
    TextEncoderError,
    UnsupportedViTError,
)
from covft.integrations import attach, detach, get_encoder
from covft.integrations.mllm.families import base_of
from tests.helpers.attached import MIXED, TEXTS, attached, changed, every_mllm, forward
from tests.helpers.mllms import BY_NAME
from tests.helpers.towers import perturb

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.sampled(2)
@every_mllm
def test_attach__changes_no_logit_at_the_start(mllm):
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    before = model(**batch.inputs).logits
    assert attach(model, TEXTS, tokenizer=mllm.tokenizer) is model
    after = model(**batch.inputs).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    # Images matter to the logits, or the comparison says nothing about them.
    other = model(**{**batch.inputs, "pixel_values": batch.inputs["pixel_values"].flip(-1)}).logits
    assert (other - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.sampled(2)
@every_mllm
def test_attach__leaves_out_what_the_model_does_not_read_and_nothing_else(mllm):
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    torch.manual_seed(1)
    encoder = get_encoder(attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0]))
    perturb(encoder)
    logits, _ = forward(model, batch)
    named = (getattr(model.config, name, None) for name in ("vision_feature_layer", "vision_feature_layers"))
    read = next((layers for layers in named if layers is not None), -1)
    last = max(read) if isinstance(read, list | tuple) else read
    vit, depth = encoder.vit, encoder.spec.depth
    detach(model)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    if last - 1 >= -depth:
        with pytest.raises(ConfigError, match=f"feature_layer={last - 1} would skip") as error:
            attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0], feature_layer=last - 1)
        assert f"feature_layer={last}" in str(error.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
        with pytest.raises(UnsupportedViTError, match="not attached"):
            get_encoder(model)
    torch.manual_seed(1)
    perturb(get_encoder(attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0], feature_layer=last)))
    short, _ = forward(model, batch)
    torch.testing.assert_close(short, logits)


@pytest.mark.sampled(2)
@every_mllm
def test_detach__gives_back_everything(mllm):
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    for parameter in model.base_model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    own = {name for name in vars(model) if not name.startswith("_")}
    before = model(**batch.inputs).logits
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    assert type(model) is classes[""]
    assert changed([model(**batch.inputs).logits], [before]) == [True]
    assert detach(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name for name in vars(model) if not name.startswith("_")} == own
    assert inspect.ismethod(model.forward)
    assert model.forward.__func__ is type(model).forward
    assert model.generate.__func__ is type(model).generate
    assert "context_text" not in inspect.signature(model.forward).parameters
    assert torch.equal(model(**batch.inputs).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    attach(model, TEXTS, tokenizer=mllm.tokenizer)


def test_detach__gives_back_a_method_that_another_library_had_replaced():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    calls = []

    def theirs(*args, **kwargs):
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = theirs
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    model(**batch.inputs)
    assert len(calls) == 1
    assert "context_text" not in calls[0]
    detach(model)
    assert model.forward is theirs


def test_signature__is_the_models_own_and_context_text():
    model = BY_NAME["llava"].build()
    own = inspect.signature(model.forward)
    attach(model, TEXTS, tokenizer=None)
    names = list(inspect.signature(model.forward).parameters)
    added = ["context_text", "context_index", "image_flags", "num_tiles"]
    assert names == [*list(own.parameters)[:-1], *added, "kwargs"]
    assert "image_flags" not in inspect.signature(model.generate).parameters
    assert inspect.signature(model.forward).parameters["context_text"].default is None
    assert (
        list(inspect.signature(base_of(model).get_image_features).parameters)
        == list(inspect.signature(type(base_of(model)).get_image_features).parameters)[1:]
    )


@pytest.mark.parametrize("name", ["llava", "internvl", "smolvlm", "qwen2_5_vl", "pixtral", "mllama"])
def test_deepcopy__has_its_own_methods_and_tower(name):
    model, batch = attached(name)
    before, _ = forward(model, batch)
    twin = copy.deepcopy(model)
    assert get_encoder(twin) is not get_encoder(model)
    assert get_encoder(twin).vit in set(twin.modules())
    assert twin.forward.attachment.model is twin
    assert twin.forward.attachment.reader is model.forward.attachment.reader
    assert torch.equal(forward(twin, batch)[0], before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(forward(model, batch)[0], before)
    assert not forward(twin, batch)[0].any()
    detach(twin)
    assert torch.equal(forward(model, batch)[0], before)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "pixtral"])
def test_pickle__keeps_all_but_the_text_encoder(name):
    mllm = BY_NAME[name]
    model = mllm.build()
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    twin = pickle.loads(pickle.dumps(model))  # before a forward: transformers' own hooks cannot be pickled
    batch = mllm.batch(detach(copy.deepcopy(model)), MIXED)
    with pytest.raises(TextEncoderError, match="left behind by pickling"):
        twin(**batch.inputs)
    get_encoder(twin).set_text_encoder(TEXTS)
    assert torch.equal(twin(**batch.inputs).logits, model(**batch.inputs).logits)
    detach(twin)
