"""Attached multimodal LLMs, their questions, and what their towers make of them."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.integrations import attach, get_encoder
from tests.helpers.mllms import BY_NAME, MLLMS, Row
from tests.helpers.towers import features, perturb
from tests.helpers.watching import watch

TEXTS = covft.testing.HashTextEncoder(16)
CUP, PEOPLE, DOG = "what is left of the cup?", "how many people are there?", "a dog, and where?"
MIXED = [Row(1, CUP), Row(0, DOG), Row(2, PEOPLE)]
every_mllm = pytest.mark.parametrize("mllm", MLLMS, ids=str)


def attached(name, rows=MIXED, **settings):
    """An attached model whose text matters, and a batch."""
    mllm = BY_NAME[name]
    model = mllm.build()
    batch = mllm.batch(model, rows)
    attach(model, TEXTS, tokenizer=mllm.tokenizer, **settings)
    perturb(get_encoder(model))
    return model, batch


def forward(model, batch, **changes):
    """Logits, and the runs of the tower."""
    with torch.no_grad():
        output, runs = watch(get_encoder(model).vit, lambda: model(**{**batch.inputs, **changes}))
    return output.logits, runs


def alone(model, images, texts):
    """What the tower makes of each image by itself, the text given by hand."""
    encoder = get_encoder(model)
    with torch.no_grad():
        found = [features(encoder(**image, text=[text])) for image, text in zip(images, texts, strict=True)]
    return [tokens[0] if tokens.dim() == 3 else tokens for tokens in found]


def changed(one, other):
    """Which rows of two tensors differ by more than rounding."""
    return [not torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(one, other, strict=True)]
