"""Beams and several sequences of attached models: the tower may run after `generate` has repeated the images."""

from __future__ import annotations

import copy

import pytest
import torch

from covft.integrations import attach, get_encoder
from tests.helpers.attached import CUP, DOG, TEXTS, alone, attached, changed
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.watching import watch

pytestmark = pytest.mark.usefixtures("quiet")
# Each way in which images are repeated.
NAMES = ["llava", "internvl", "llava_next", "idefics3", "qwen2_5_vl", "qwen3_vl", "pixtral", "mllama"]
every_layout = pytest.mark.parametrize("name", NAMES)
LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4}
BEAMS = {**LENGTH, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
TILES = {"llava_next": [3, 5, 3]}
ROWS = [Row(1, CUP), Row(1, DOG)]


def beams(model, inputs, **given):
    """The beams of each row and their scores."""
    options = {**BEAMS, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**inputs, **options, **given)
    return found.sequences, found.sequences_scores


def row_of(inputs, row):
    """One row of a batch of rows with one image each."""
    if "image_grid_thw" in inputs:
        patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
        inputs = {**inputs, "pixel_values": [patches[row]] * len(patches)}
        rest = {name: value[row : row + 1] for name, value in inputs.items() if name != "pixel_values"}
        return {**rest, "pixel_values": patches[row]}
    return {name: value[row : row + 1] for name, value in inputs.items()}


@every_layout
def test_beams_and_sequences__equal_the_plain_models_at_the_start(name):
    mllm = BY_NAME[name]
    plain = mllm.build()
    inputs = mllm.batch(plain, ROWS).inputs
    model = attach(copy.deepcopy(plain), TEXTS, tokenizer=mllm.tokenizer)
    sequences, scores = beams(model, inputs)
    expected, expected_scores = beams(plain, inputs)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-5)

    def sampled(model):
        torch.manual_seed(0)
        return model.generate(**inputs, **LENGTH, do_sample=True, num_return_sequences=3)

    assert torch.equal(sampled(model), sampled(plain))


@every_layout
def test_beams__of_each_row_are_those_of_the_row_alone(name):
    model, batch = attached(name, ROWS)
    model.double()
    inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].double()}
    sequences, scores = beams(model, inputs)
    _, swapped = beams(model, inputs, context_text=[DOG, CUP])
    for row in range(2):
        own = slice(2 * row, 2 * row + 2)
        expected, expected_scores = beams(model, row_of(inputs, row))
        assert torch.equal(sequences[own], expected)
        torch.testing.assert_close(scores[own], expected_scores, rtol=1e-6, atol=0)
        assert not torch.allclose(swapped[own], expected_scores, rtol=1e-6, atol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("given", ["as an argument", "as a condition"])
@every_layout
def test_texts_of_images__go_with_every_repetition_of_their_image(name, given):
    model, batch = attached(name, [Row(1, CUP), Row(2, DOG)])
    encoder, texts = get_encoder(model), ["one", "two", "three"]
    owners = [image for image, tiles in enumerate(TILES.get(name, [1, 1, 1])) for _ in range(tiles)]

    def run(**options):
        options = {"max_new_tokens": 1, "do_sample": False, **options}
        if given == "as an argument":
            return watch(encoder.vit, lambda: model.generate(**batch.inputs, **options, context_text=texts))[1][0]
        with encoder.condition(texts, [0, *owners] if name == "mllama" else owners):  # its first row is padded
            return watch(encoder.vit, lambda: model.generate(**batch.inputs, **options))[1][0]

    once = run().images
    repeated = run(num_beams=2)
    asked = []
    for image in repeated.images:  # which one it is, by its pixels
        same = [all(torch.equal(image[key], other[key]) for key in image) for other in once]
        asked.append(texts[owners[same.index(True)]])
    assert not any(changed(repeated.features, alone(model, repeated.images, asked)))
