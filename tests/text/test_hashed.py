"""The text encoder without a model."""

import hashlib

import pytest
import torch

from covft.errors import TextEncoderError
from covft.testing import HashTextEncoder


def test_features_are_a_function_of_the_text():
    features = HashTextEncoder(32).encode(["a cup", "a cat", "a cup"])
    assert features.shape == (3, 32)
    assert torch.equal(features[0], features[2])
    assert not torch.allclose(features[0], features[1])


def test_features_depend_on_the_text_alone():
    """Not the global seed, and not Python's own hash, which differs from process to process."""
    seed = int.from_bytes(hashlib.sha256(b"a cup").digest()[:8], "big", signed=True)
    expected = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(1)
    assert torch.equal(HashTextEncoder(3).encode(["a cup"]), expected)


def test_a_width_of_zero_is_refused():
    with pytest.raises(TextEncoderError, match="an int from 1"):
        HashTextEncoder(0)
