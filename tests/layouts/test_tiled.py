"""A tower that sees rows of images of tiles (Mllama): one text per image, and padding is ignored."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.errors import ShapeError
from tests.helpers import oracle
from tests.helpers.towers import MLLAMA, PATCH, SIZE, TEXT_DIM, perturb

PATCHES = (SIZE // PATCH) ** 2 + 1  # of a tile, its class token among them


def wrapped(**settings):
    encoder = covft.wrap(MLLAMA.build().double().eval(), TEXT_DIM, **settings)
    perturb(encoder)
    return encoder


def batch():
    """Two rows of two images of 2, 1, 4 and no tiles."""
    images = torch.randn(2, 2, 4, 3, SIZE, SIZE, dtype=torch.float64)
    mask = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
    return images, {"aspect_ratio_ids": torch.tensor([[2, 1], [4, 0]]), "aspect_ratio_mask": mask}


def test_an_ffn_is_the_equations_over_the_real_tokens():
    encoder = wrapped(layers=[1])
    (images, inputs), texts = batch(), torch.randn(4, TEXT_DIM, dtype=torch.float64)
    calls = []
    slot = encoder.slots()[1]
    slot.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    encoder(images, texts, **inputs)
    ((x, output),) = calls
    padded = x.shape[1] // 4
    assert x.shape[0] == 4
    assert padded == 24 > PATCHES  # the tower pads tiles to a multiple of 8
    for number, tiles in enumerate([2, 1, 4, 4]):  # an image of padding alone counts all its tiles
        tokens = x[number].view(4, padded, -1)[:tiles, :PATCHES].flatten(0, 1)
        vector = oracle.context_vector("cve", slot.context, tokens, texts[number], 4, "gelu")
        weights = oracle.routing_weights(vector, slot.router.gate)
        wanted = sum(weight * expert(x[number]) for weight, expert in zip(weights, slot.experts, strict=True))
        torch.testing.assert_close(output[number], wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(encoder.routing_weights()[1][number], weights, rtol=1e-10, atol=1e-10)


def test_another_text_changes_its_image_alone():
    encoder = wrapped()
    (images, inputs), texts = batch(), torch.randn(4, TEXT_DIM, dtype=torch.float64)
    before = encoder(images, texts, **inputs).last_hidden_state.flatten(0, 1)
    texts[1] = -texts[1]
    after = encoder(images, texts, **inputs).last_hidden_state.flatten(0, 1)
    assert [torch.allclose(x, y) for x, y in zip(before, after, strict=True)] == [True, False, True, True]
    own = encoder(images[:1, 1:], texts[1:2], **{name: value[:1, 1:] for name, value in inputs.items()})
    torch.testing.assert_close(own.last_hidden_state[0], after[1:2])


def test_the_number_of_texts_is_that_of_images():
    encoder = wrapped()
    images, inputs = batch()
    with pytest.raises(ShapeError, match="4 images, but the text is for 2"):
        encoder(images, torch.randn(2, TEXT_DIM, dtype=torch.float64), **inputs)
