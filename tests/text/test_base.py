"""The machinery that all text encoders share, through the smallest of them."""

import copy
import sys

import pytest
import torch
from torch import nn

from covft.errors import ShapeError, TextEncoderError
from covft.testing import HashTextEncoder
from covft.text import CachedTextEncoder, CallableTextEncoder, TextEncoder


class Counting:
    """A text model that records its calls."""

    def __init__(self, text_dim=6):
        self.text_dim = text_dim
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return torch.tensor([[float(len(text) + i) for i in range(self.text_dim)] for text in texts])


@pytest.fixture
def counting():
    model = Counting()
    encoder = CallableTextEncoder(model)
    model.calls.clear()
    return model, encoder


def test_every_encoder_is_a_text_encoder_and_not_a_module(counting):
    for encoder in (counting[1], HashTextEncoder(4)):
        assert isinstance(encoder, TextEncoder)
        assert not isinstance(encoder, nn.Module)
        holder = nn.Linear(2, 2)
        holder.text_encoder = encoder
        assert set(holder.state_dict()) == {"weight", "bias"}


def test_texts_are_encoded_alone_and_each_once(counting):
    model, encoder = counting
    first = encoder.encode(["aa", "b", "aa", "cccc"])
    second = encoder.encode(["cccc", "aa"])
    assert model.calls == [["aa"], ["b"], ["cccc"]]
    assert first[:, 0].tolist() == [2, 1, 2, 4]
    assert torch.equal(second, first[[3, 0]])


def test_the_cache_is_bounded_and_all_rows_still_come_back():
    row_bytes = sys.getsizeof("question 10") + 6 * 4
    model = Counting()
    encoder = CallableTextEncoder(model, text_dim=6, cache_bytes=3 * row_bytes)
    texts = [f"question {index}" for index in range(10, 60)]
    assert torch.equal(encoder.encode(texts), model(texts))
    assert len(encoder.cache) == 3
    model.calls.clear()
    encoder.encode(["question 59", "question 58", "question 57"])
    assert model.calls == []
    encoder.encode(["question 10"])
    assert model.calls == [["question 10"]]


def test_cached_features_own_no_more_than_their_row():
    table = torch.randn(1000, 8)
    encoder = CallableTextEncoder(lambda texts: table[:1], name="table")
    encoder.encode(["a"])
    assert encoder.cache.get("a").untyped_storage().nbytes() == 8 * 4


def test_changing_the_features_does_not_change_the_cached_ones(counting):
    encoder = counting[1]
    before = encoder.encode(["abc"]).clone()
    encoder.encode(["abc"]).zero_()
    assert torch.equal(encoder.encode(["abc"]), before)


@pytest.mark.parametrize("empty", ["", " ", "\n\t "])
def test_an_empty_question_is_refused_by_its_index(counting, empty):
    with pytest.raises(TextEncoderError, match="Text 2 is empty"):
        counting[1].encode(["a", "b", empty])
    assert counting[0].calls == []


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["nested"]])
def test_an_entry_that_is_not_a_string_is_refused_by_its_index(counting, wrong):
    with pytest.raises(TextEncoderError, match="Text 1 is not a string"):
        counting[1].encode(["a", wrong])


@pytest.mark.parametrize("wrong", ["a question", b"bytes", 7])
def test_texts_must_be_a_list(counting, wrong):
    with pytest.raises(TextEncoderError, match="takes a list"):
        counting[1].encode(wrong)


def test_no_texts_give_no_rows(counting):
    assert counting[1].encode([]).shape == (0, 6)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (1, 5), (1, 1, 6), (1, 0)])
def test_features_of_another_shape_are_refused(shape):
    encoder = CallableTextEncoder(lambda texts: torch.zeros(shape), text_dim=6)
    with pytest.raises(ShapeError, match=r"Expected: \(1, 6\)"):
        encoder.encode(["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_not_cached(value):
    encoder = CallableTextEncoder(lambda texts: torch.full((1, 6), value), text_dim=6)
    with pytest.raises(TextEncoderError, match="'what\\?' are not finite"):
        encoder.encode(["what?"])
    assert len(encoder.cache) == 0


@pytest.mark.parametrize("features", [torch.zeros(1, 6, dtype=torch.int64), [[0.0] * 6], None])
def test_features_of_another_type_are_refused(features):
    with pytest.raises(TextEncoderError, match=r"tensor|floating"):
        CallableTextEncoder(lambda texts: features, text_dim=6).encode(["a"])


def test_features_do_not_depend_on_the_callers_modes():
    linear = nn.Linear(8, 8)
    seen = torch.randn(1, 8)

    def encoder():
        return CallableTextEncoder(lambda texts: linear(seen), text_dim=8)

    plain = encoder().encode(["a"])
    assert not plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder().encode(["a"]), plain)
    # Features first computed during evaluation must work in training later.
    kept = encoder()
    with torch.inference_mode():
        features = kept.encode(["a"])
    head = nn.Linear(8, 1)
    (head(features) + head(kept.encode(["a"]))).sum().backward()
    assert torch.equal(head.weight.grad, 2 * plain)


def test_features_made_in_inference_mode_can_be_trained_on():
    def function(texts):
        with torch.inference_mode():
            return torch.ones(1, 4)

    head = nn.Linear(4, 1)
    head(CallableTextEncoder(function).encode(["a"])).sum().backward()
    assert head.weight.grad.tolist() == [[1, 1, 1, 1]]


def test_a_copy_shares_the_encoder(counting):
    assert copy.deepcopy({"encoder": counting[1]})["encoder"] is counting[1]


def test_a_model_cast_later_does_not_mix_types():
    linear = nn.Linear(4, 4)
    encoder = CallableTextEncoder(lambda texts: linear(torch.ones(1, 4, dtype=linear.weight.dtype)))
    encoder.encode(["old"])
    linear.double()
    assert encoder.encode(["old", "new"]).dtype == torch.float64


def test_only_hugging_face_encoders_take_tokens():
    with pytest.raises(TextEncoderError, match="strings, not a tokenised batch"):
        HashTextEncoder(4).encode_tokens({"input_ids": [[1, 2]]})


def test_two_questions_with_equal_features_are_refused():
    class Constant(CachedTextEncoder):
        def __init__(self):
            super().__init__("constant")
            self.text_dim = self._probe()

        def _encode_one(self, text):
            return torch.ones(1, 3)

    with pytest.raises(TextEncoderError, match="the same features"):
        Constant()
