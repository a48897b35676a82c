"""Texts that the caller gives."""

from __future__ import annotations

import pytest
import torch

from covft.errors import (
    MissingContextError,
    ShapeError,
)
from covft.integrations import attach, get_encoder
from tests.helpers.attached import CUP, DOG, MIXED, PEOPLE, TEXTS, alone, attached, changed, every_mllm, forward
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.watching import watch

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.sampled(2)
@every_mllm
def test_context_text__per_row_and_per_image(mllm):
    model, batch = attached(mllm.name)
    _, read = forward(model, batch)
    _, per_row = forward(model, batch, context_text=["one", "two", "three"])
    owners = {0: "one", 1: "two", 2: "three"}
    wanted = alone(model, read[0].images, [owners[row] for row in batch.row_of_tile])
    assert not any(changed(per_row[0].features, wanted))
    _, features = forward(model, batch, context_text=get_encoder(model).encode_text(["one", "two", "three"]))
    assert not any(changed(features[0].features, wanted))
    _, shared = forward(model, batch, context_text="one")
    assert not any(changed(shared[0].features, alone(model, read[0].images, ["one"] * len(batch.row_of_tile))))


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "qwen2_vl", "qwen2_5_vl", "mistral3"])
def test_context_text__per_image_of_one_row_each(name):
    rows = [Row(2, CUP), Row(2, DOG)]
    model, batch = attached(name, rows)
    _, read = forward(model, batch)
    asked = ["one", "two", "three", "four"]
    _, given = forward(model, batch, context_text=asked)
    tiles = [3, 5, 3, 3] if name == "llava_next" else [1] * 4
    per_tile = [text for text, count in zip(asked, tiles, strict=True) for _ in range(count)]
    assert not any(changed(given[0].features, alone(model, read[0].images, per_tile)))
    with pytest.raises(ShapeError, match="context_text does not fit"):
        forward(model, batch, context_text=["one", "two", "three"])


def test_context_text__an_open_condition_is_the_text():
    model, batch = attached("llava")
    with get_encoder(model).condition(["one", "two"], index=[0, 1, 1]):
        _, given = forward(model, batch)
        tokens = model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    assert not any(changed(given[0].features, alone(model, given[0].images, ["one", "two", "two"])))
    assert torch.equal(
        tokens,
        model.generate(**batch.inputs, context_text=["one", "x", "two"], max_new_tokens=2, do_sample=False),
    )


def test_context_text__of_get_image_features():
    model, batch = attached("llava_next")
    images = {name: batch.inputs[name] for name in ("pixel_values", "image_sizes")}
    with pytest.raises(MissingContextError, match="called without text"):
        model.get_image_features(**images)
    with torch.no_grad():
        _, runs = watch(
            get_encoder(model).vit,
            lambda: model.get_image_features(**images, context_text=["one", "two", "three"]),
        )
    per_tile = ["one"] * 3 + ["two"] * 5 + ["three"] * 3
    assert not any(changed(runs[0].features, alone(model, runs[0].images, per_tile)))


def test_context_text__replaces_a_prompt_that_cannot_be_read():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    attach(model, TEXTS, tokenizer=None)
    with pytest.raises(MissingContextError, match=r"context_text=\['the question of row 0'"):
        model(**batch.inputs)
    assert model(**batch.inputs, context_text=[CUP, DOG, PEOPLE]).logits.isfinite().all()
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    given = {**batch.inputs, "input_ids": None, "inputs_embeds": embeds}
    with pytest.raises(MissingContextError, match="no prompt to read"):
        model(**given)
    assert model(**given, context_text=[CUP, PEOPLE, PEOPLE]).logits.isfinite().all()


def test_routing_that_needs_no_text__reads_nothing():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    attach(model, None, tokenizer=None, routing="uniform")
    assert model(**batch.inputs).logits.isfinite().all()
    assert model.generate(**batch.inputs, max_new_tokens=1, do_sample=False).shape[0] == 3
