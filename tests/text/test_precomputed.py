"""The text encoder for features that the caller brings."""

import pytest

from covft.errors import CoVFTError, TextEncoderError
from covft.text import PrecomputedFeatures, TextEncoder


def test_it_has_a_width_and_refuses_texts():
    encoder = PrecomputedFeatures(768)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.text_dim, encoder.name) == (768, "features:768")
    with pytest.raises(TextEncoderError, match=r"features of shape \(S, 768\)"):
        encoder.encode(["a question"])


@pytest.mark.parametrize("width", [0, -1, True])
def test_a_width_below_one_is_refused(width):
    with pytest.raises(CoVFTError, match=r"an int from 1|a whole number"):
        PrecomputedFeatures(width)
