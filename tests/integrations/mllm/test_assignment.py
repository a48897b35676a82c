"""Each text that is given reaches exactly the images that it is for, or the call is refused before the tower runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from covft.errors import CoVFTError, ShapeError, TextEncoderError
from covft.integrations import get_encoder
from tests.helpers.attached import CUP, DOG, attached, changed, forward
from tests.helpers.mllms import Row
from tests.helpers.towers import image_features

pytestmark = pytest.mark.usefixtures("quiet")
BATCHES = [[1], [2], [1, 1], [2, 0], [0, 1], [1, 0, 2], [2, 1]]
TILES = {"llava": [1], "llava_next": [3, 5, 3], "qwen2_5_vl": [1], "idefics3": [1]}
NAMES = [f"text {number}" for number in range(14)]


class TowerRunsError(Exception):
    """The tower is about to run."""


@pytest.fixture
def seen():
    """Make a function that calls a model until its tower runs, and returns the text of every tile."""

    def call(model, **inputs):
        encoder, found = get_encoder(model), []

        def look(vit, args, kwargs):
            scope: Any = encoder.conditioning.scope()
            found.append(scope.text_features if scope.index is None else scope.text_features[scope.index])
            raise TowerRunsError

        handle = encoder.vit.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.no_grad(), pytest.raises(TowerRunsError):
                model(**inputs)
        finally:
            handle.remove()
        return found[0]

    return call


def oracle(counts, tiles, num_texts, index):
    """The number of the text of every tile; None where the call must be refused."""
    owners, images = [], []
    for row, count in enumerate(counts):
        for _ in range(count):
            size = tiles[len(set(images)) % len(tiles)]
            images += [len(set(images))] * size
            owners += [row] * size
    if index is not None:
        spare = {*range(num_texts)} - {*index}
        fits = len(index) == len(owners) and all(0 <= i < num_texts for i in index)
        return index if fits and (not spare or num_texts == len(counts)) else None
    if num_texts == len(counts) == 1:
        return [0] * len(owners)
    for each in (owners if num_texts == len(counts) else None, images, list(range(len(owners)))):
        if each is not None and (each is owners or num_texts == len({*each})):
            return each
    return None


def indices(total, rows):
    """No index, and indices that are right, wrong, too short, negative or too high."""
    yield from (None, [0] * total, list(range(total)), [i % rows for i in range(total)], [rows - 1] * total)
    yield from ([0] * (total - 1), [-1] * total, [total + rows] * total)


@pytest.mark.parametrize("name", TILES)
def test_every_combination_of_rows_images_texts_and_index(name, seen):
    refused = used = 0
    for counts in BATCHES:
        model, batch = attached(name, [Row(count, CUP) for count in counts])
        features = get_encoder(model).encode_text(NAMES)
        total = len(batch.row_of_tile)
        for num_texts in range(1, total + 3):
            for index in indices(total, len(counts)):
                given = {**batch.inputs, "context_text": NAMES[:num_texts], "context_index": index}
                wanted = oracle(counts, TILES[name], num_texts, index)
                if wanted is None:
                    refused += 1
                    with pytest.raises(ShapeError):
                        model(**given)
                else:
                    used += 1
                    assert torch.equal(seen(model, **given), features[wanted]), (counts, num_texts, index)
    assert refused > 50
    assert used > 30


def test_what_the_table_holds__by_hand():
    assert oracle([2], [1], 2, [0, 0]) is None  # the second text would never be used
    assert oracle([1, 1], [1], 3, [0, 1]) is None
    assert oracle([2], [1], 2, None) == [0, 1]
    assert oracle([2, 0], [1], 2, None) == [0, 0]
    assert oracle([1, 1], [3, 5], 8, None) == list(range(8))


@pytest.mark.parametrize("index", [[0, 1, 1], [1, 1, 0], torch.tensor([0, 0, 0])])
def test_index_without_texts__is_the_row_that_is_read(index, seen):
    model, batch = attached("llava", [Row(1, CUP), Row(2, DOG)])
    wanted = get_encoder(model).encode_text([(CUP, DOG)[row] for row in index])
    assert torch.equal(seen(model, **batch.inputs, context_index=index), wanted)


@pytest.mark.parametrize("index", [[0, 1, 2], [-1, 0, 1], [0.0, 1.0, 1.0], [[0, 1, 1]], [True, False, True], [0, 1]])
def test_index_without_texts__that_is_not_of_the_batch(index):
    model, batch = attached("llava", [Row(1, CUP), Row(2, DOG)])
    with pytest.raises(ShapeError):
        model(**batch.inputs, context_index=index)


def test_index__in_generate_and_get_image_features():
    model, batch = attached("llava", [Row(1, CUP), Row(2, DOG)])
    encoder = get_encoder(model)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    with encoder.condition(["one", "two", "three"], [2, 0, 1]):
        wanted = model.generate(**batch.inputs, **options)
        features = image_features(model.get_image_features(batch.inputs["pixel_values"]))
    given = {"context_text": ["one", "two", "three"], "context_index": [2, 0, 1]}
    assert torch.equal(model.generate(**batch.inputs, **given, **options), wanted)
    found = image_features(model.get_image_features(batch.inputs["pixel_values"], **given))
    assert not any(changed(found, features))
    with pytest.raises(ShapeError, match="leaves out a text"):
        model.generate(**batch.inputs, context_text=["one", "two", "three"], context_index=[0, 1, 1], **options)


def test_index__inside_an_open_condition():
    model, batch = attached("llava", [Row(1, CUP), Row(2, DOG)])
    with get_encoder(model).condition(["one", "two", "three"]), pytest.raises(ShapeError, match="their own index"):
        model(**batch.inputs, context_index=[0, 1, 1])
    with get_encoder(model).condition("one"):  # the one text is for all
        logits, _ = forward(model, batch, context_index=[0, 1, 1])
    assert torch.equal(logits, forward(model, batch, context_text="one")[0])


@pytest.mark.parametrize(
    "texts",
    [
        {"one", "two"},
        {"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 4)},
        b"ab",
        7,
        [1, 2],
        [],
        ["", ""],
    ],
    ids=["set", "tokens", "bytes", "number", "numbers", "none", "empty"],
)
def test_texts_without_an_order_or_of_another_kind(texts):
    model, batch = attached("llava", [Row(1, CUP), Row(1, DOG)])
    with pytest.raises(CoVFTError) as caught:
        model(**batch.inputs, context_text=texts)
    assert isinstance(caught.value, ShapeError | TextEncoderError)


@pytest.mark.parametrize("kind", [tuple, np.array, lambda texts: (text for text in texts)])
def test_texts_in_other_containers(kind, seen):
    model, batch = attached("llava", [Row(1, CUP), Row(1, DOG)])
    wanted = get_encoder(model).encode_text(["one", "two"])
    assert torch.equal(seen(model, **batch.inputs, context_text=kind(["one", "two"])), wanted)


@pytest.mark.parametrize("texts", [["a", "a", "a"], ["a", "b"], [], torch.ones(1, 16)])
def test_videos__as_many_texts_as_rows(texts):
    model, batch = attached("llava_onevision", [Row(1, CUP), Row(1, CUP)])
    with pytest.raises(ShapeError, match="only one text"):
        model(batch.inputs["input_ids"], pixel_values_videos=torch.randn(1, 2, 3, 32, 32), context_text=texts)
