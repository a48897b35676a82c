"""Models of sentence-transformers: the real MiniLM."""

import warnings

import pytest
import torch
from torch import nn

from covft.errors import TextEncoderError
from covft.text import SentenceTransformersEncoder

TEXTS = ["What is left of the cup?", "a cat", "Describe the picture in three sentences, with every detail."]


@pytest.fixture(scope="module")
def model(minilm_folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm_folder, device="cpu")


def test_features_are_those_of_its_own_encode(model, minilm_folder):
    encoder = SentenceTransformersEncoder(model)
    expected = torch.stack([model.encode(text, convert_to_tensor=True) for text in TEXTS])
    assert torch.equal(encoder.encode(TEXTS), expected)
    assert (encoder.text_dim, encoder.name) == (384, minilm_folder)


def test_neighbours_change_nothing(model):
    encoder = SentenceTransformersEncoder(model, cache_bytes=0)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    assert torch.equal(encoder.encode(TEXTS), alone)


def test_meaning_is_there(model):
    cat, kitten, debt = SentenceTransformersEncoder(model).encode(["a cat", "a kitten", "national debt"])
    assert cat @ kitten > 0.6 > 0.3 > cat @ debt


def test_it_is_frozen_and_trainable_on(model):
    encoder = SentenceTransformersEncoder(model, cache_bytes=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = encoder.encode(TEXTS)
    model.train()
    assert torch.equal(encoder.encode(TEXTS), before)
    head = nn.Linear(384, 1)
    head(before).sum().backward()
    torch.testing.assert_close(head.weight.grad[0], before.sum(0))


def test_too_long_texts_are_cut_with_one_warning(model):
    encoder = SentenceTransformersEncoder(model)
    with pytest.warns(UserWarning, match="at most 256 tokens; a text of 302 tokens"):
        encoder.encode(["cup " * 300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["cat " * 300])


def test_a_folder_is_loaded_and_owned(minilm_folder):
    encoder = SentenceTransformersEncoder(minilm_folder)
    assert encoder.encode(["a cat"]).shape == (1, 384)
    assert encoder.to("meta").model[0].auto_model.device.type == "meta"


def test_a_loaded_model_stays_where_it_is(model):
    assert SentenceTransformersEncoder(model).to("meta").device.type == "cpu"


def test_an_id_that_is_not_cached_says_what_to_do():
    with pytest.raises(TextEncoderError, match="hf download nobody/no-such-model"):
        SentenceTransformersEncoder("nobody/no-such-model")


def test_other_models_of_the_library_are_refused():
    class CrossEncoder(nn.Module):
        pass

    with pytest.raises(TextEncoderError, match="no dense features"):
        SentenceTransformersEncoder(CrossEncoder())
