"""The null text: what it replaces, how it is drawn, trained and saved."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import covft
from covft.errors import ConfigError, MissingContextError, TextEncoderError, UnsupportedViTError
from covft.nn.null_text import NullText
from covft.testing import HashTextEncoder
from tests.helpers.checkpointing import WAYS, one_forward, plain
from tests.helpers.conditioning import Case
from tests.helpers.releases import trained
from tests.helpers.snapshots import aligned, assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME, TEXT_DIM, features, perturb

NAME = "covft_null_text.vector"


def wrapped(name="timm-clip", text_encoder=TEXT_DIM, **settings):
    tower = BY_NAME[name]
    encoder = covft.wrap(tower.build().eval(), text_encoder, null_text=True, **settings)
    perturb(encoder)
    return encoder, tower


def vector_of(encoder):
    return encoder.get_parameter(f"vit.{NAME}")


def test_null_text__draws_rows_by_seed_in_training_and_none_in_eval():
    null, text = NullText(3, 0.3), torch.ones(20_000, 3)
    nn.init.constant_(null.vector, 2.0)
    first, again, other = (null(text, 20_000, None, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    dropped = (first == 2).all(1)
    assert torch.equal((first == 2).any(1), dropped)
    assert abs(dropped.float().mean() - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    null.eval()
    with torch.no_grad():
        assert null(text, 20_000, None, 5) is text
    assert torch.equal(null(text, 20_000), text)
    row = torch.arange(20_000) == 7
    assert torch.equal(null(text, 20_000, row)[7], null.vector)
    assert torch.equal(null(text, 20_000, row)[8:], text[8:])


@pytest.mark.parametrize("name", ["timm-clip", "hf-qwen2.5-vl"])
@torch.no_grad()
def test_calls_without_text__are_those_with_the_vector_as_text(name):
    encoder, tower = wrapped(name, HashTextEncoder(TEXT_DIM))
    images, inputs, vector = tower.images(3), tower.inputs(3), vector_of(encoder)
    none = features(encoder(images, **inputs))
    assert torch.equal(none, features(encoder(images, vector.expand(3, -1), **inputs)))
    assert torch.equal(none, features(encoder(images, [None, None, None], **inputs)))
    with encoder.condition(None):
        assert torch.equal(none, features(encoder(images, **inputs)))
    texts = encoder.encode_text(["where?", "what is it?"])
    mixed = torch.stack([texts[0], vector, texts[1]])
    for given, index in ((["where?", None, "what is it?"], None), (["what is it?", "where?", None], [1, 2, 0])):
        found = features(encoder(images, given, index=index, **inputs))
        assert torch.equal(found, features(encoder(images, mixed, **inputs)))
    assert not torch.allclose(none, features(encoder(images, "where?", **inputs)))


def test_calls_without_text__stay_errors_without_a_null_text():
    tower = BY_NAME["timm-clip"]
    encoder = covft.wrap(tower.build(), HashTextEncoder(TEXT_DIM))
    with pytest.raises(MissingContextError):
        encoder(tower.images(2))
    with pytest.raises(TextEncoderError, match="Text 1 is not a string"):
        encoder(tower.images(2), ["where?", None])


def test_training__the_same_rows_in_every_block_and_new_ones_in_every_forward():
    encoder, tower = wrapped(null_text_rate=0.5)
    encoder.train()
    seen = []
    for slot in encoder.slots().values():
        slot.context.register_forward_pre_hook(lambda context, args: seen.append(args[1].detach()))
    images, text = tower.images(32), torch.randn(32, TEXT_DIM)
    encoder(images, text)
    encoder(images, text)
    blocks = len(encoder.layers)
    rows = [(given == vector_of(encoder)).all(1) for given in seen]
    assert all(torch.equal(row, rows[0]) for row in rows[:blocks])
    assert 0 < rows[0].sum() < 32
    assert not torch.equal(rows[0], rows[blocks])
    assert torch.equal(seen[0][~rows[0]], text[~rows[0]])


@pytest.mark.parametrize("way", WAYS)
def test_training__a_recomputation_replaces_the_same_rows(way):
    case = Case("timm-clip", null_text=True, null_text_rate=0.5)
    wanted = case.gradients(one_forward, plain(case))
    assert wanted[f"vit.{NAME}"].any()
    found = case.gradients(one_forward, way(case))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("train", [True, False])
def test_training__the_vector_has_a_gradient_where_no_row_was_replaced(train):
    encoder, tower = wrapped(null_text_rate=0)
    encoder.train(train)
    encoder(tower.images(2), torch.randn(2, TEXT_DIM)).sum().backward()
    assert vector_of(encoder).grad is not None
    assert not vector_of(encoder).grad.any()
    encoder(tower.images(2)).square().sum().backward()
    assert vector_of(encoder).grad.any()


def test_start__no_output_changes_and_the_vector_learns_from_zero():
    tower = BY_NAME["timm-clip"]
    vit, images = tower.build().eval(), tower.images(2)
    before = vit(images).detach()
    encoder = covft.wrap(vit, TEXT_DIM, null_text=True)
    torch.testing.assert_close(encoder(images), before)
    perturb(encoder)
    with torch.no_grad():
        vector_of(encoder).zero_()
    encoder(images).square().sum().backward()
    assert torch.isfinite(vector_of(encoder).grad).all()
    assert vector_of(encoder).grad.any()


@torch.no_grad()
def test_saved__loaded_counted_grouped_copied_and_unwrapped(tmp_path):
    encoder, tower = wrapped("hf-clip")
    without = covft.wrap(tower.build(), TEXT_DIM)
    images = tower.images(2)
    count = sum(p.numel() for p in encoder.trainable_parameters())
    assert count == sum(p.numel() for p in without.trainable_parameters()) + TEXT_DIM
    assert encoder.part_of(NAME) == "router"
    (group,) = (g for g in encoder.param_groups(lr=1e-3) if any(p is vector_of(encoder) for p in g["params"]))
    assert group["name"].startswith("router")
    found = features(encoder(images))
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        vector_of(twin).add_(1)
        assert not torch.equal(features(twin(images)), found)
    base = covft.unwrap(copy.deepcopy(encoder))
    assert not any("covft" in name for name in base.state_dict())
    encoder.save_pretrained(tmp_path / "encoder")
    assert json.loads((tmp_path / "encoder" / "covft_config.json").read_text())["covft"]["null_text"] is True
    loaded = covft.load(tmp_path / "encoder", copy.deepcopy(base), TEXT_DIM)
    assert torch.equal(vector_of(loaded), vector_of(encoder))
    assert torch.equal(features(loaded(images)), found)
    encoder.vit.save_pretrained(tmp_path / "vit")  # the tower as it was, and the adapted one in a folder of it
    again = type(base).from_pretrained(tmp_path / "vit").eval()
    assert torch.equal(features(again(images)), features(base(images)))
    loaded = covft.load(tmp_path / "vit" / "covft", again, TEXT_DIM)
    assert torch.equal(features(loaded(images)), found)


def test_budget__counts_the_vector():
    vit = BY_NAME["timm-clip"].build()
    plain_one, with_null = (covft.budget(vit, "covft", text_dim=16, null_text=null) for null in (False, True))
    assert with_null.parameters == plain_one.parameters + 16


@trained
@torch.no_grad()
def test_attach__rows_without_an_instruction():
    tiny = covft.testing.tiny_llava()
    empty, asked = tiny.batch([""]), tiny.batch(["what is left of the cup?"])
    model = covft.attach(tiny.model, HashTextEncoder(TEXT_DIM), tokenizer=tiny.tokenizer, null_text=True)
    encoder = covft.get_encoder(model)
    perturb(encoder)
    model.eval()
    vector = vector_of(encoder)[None]
    assert torch.equal(model(**empty).logits, model(**empty, context_text=vector).logits)
    assert torch.equal(model(**asked).logits, model(**asked, context_text="what is left of the cup?").logits)
    assert not torch.allclose(model(**asked).logits, model(**asked, context_text=vector).logits)
    covft.detach(model)
    covft.attach(model, HashTextEncoder(TEXT_DIM), tokenizer=tiny.tokenizer)
    with pytest.raises(MissingContextError, match="are empty"):
        model(**empty)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "uniform"}, "this routing reads no text"),
        ({"context": "image"}, "this routing reads no text"),
        ({"null_text_rate": 1.5}, "is not a share"),
        ({"null_text": 1}, "null_text=1 cannot be used"),
    ],
    ids=str,
)
def test_refused__settings(settings, message):
    vit = BY_NAME["timm-clip"].build()
    before = snapshot(vit)
    with pytest.raises(ConfigError, match=message):
        covft.wrap(vit, TEXT_DIM, **{"null_text": True, **settings})
    assert_unchanged(vit, before)


def test_refused__a_vit_that_would_call_it():
    from covft.surgery.checks import check_null_text

    with pytest.raises(UnsupportedViTError, match="calls its children"):
        check_null_text(nn.Sequential(nn.Linear(1, 1)), covft.CoVFTConfig(null_text=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the_adapted_tower_is_not_loaded")
def test_attach__a_saved_model_has_its_own_tower_and_the_vector_beside_it(tmp_path):
    tiny = covft.testing.tiny_llava()
    names, empty = set(tiny.model.state_dict()), tiny.batch([""])
    model = covft.attach(tiny.model, HashTextEncoder(TEXT_DIM), tokenizer=tiny.tokenizer, null_text=True)
    perturb(covft.get_encoder(model))
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert set(loaded.state_dict()) == names
    covft.attach(loaded, HashTextEncoder(TEXT_DIM), tokenizer=tiny.tokenizer, pretrained=tmp_path / "covft")
    with torch.no_grad():
        assert torch.equal(aligned(loaded)(**empty).logits, model(**empty).logits)
