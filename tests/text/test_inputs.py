"""Texts and features that a caller brings: what has no order, is no text or is not finite is refused before compute."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import covft
from covft.errors import CoVFTError, MissingContextError, ShapeError, TextEncoderError
from covft.testing import HashTextEncoder, ToyViT
from tests.helpers.towers import perturb

IMAGES = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def encoder():
    encoder = covft.wrap(ToyViT(), HashTextEncoder(4), layers=[1])
    perturb(encoder)
    return encoder


# Texts

SEQUENCES = [
    ("b", "a"),
    collections.deque(["b", "a"]),
    np.array(["b", "a"]),
    np.array(["b", "a"], dtype=object),
    [np.str_("b"), np.str_("a")],
    pandas.Series(["b", "a"], index=[7, 3]),
    pandas.Index(["b", "a"]),
]


@pytest.mark.parametrize("texts", SEQUENCES, ids=lambda texts: type(texts).__name__)
def test_sequences__are_read_in_their_order(encoder, texts):
    assert torch.equal(encoder.encode_text(texts), encoder.encode_text(["b", "a"]))
    assert torch.equal(encoder(IMAGES, texts), encoder(IMAGES, ["b", "a"]))


WITHOUT_ORDER = {
    "set": {"a", "b"},
    "frozenset": frozenset(["a", "b"]),
    "keys": {"a": 1, "b": 2}.keys(),
    "values": {1: "a", 2: "b"}.values(),
    "generator": (text for text in ["a", "b"]),
    "iterator": iter(["a", "b"]),
    "map": map(str, ["a", "b"]),
    "frame": pandas.DataFrame({"a": [1], "b": [2]}),  # iterates over the names of its columns
    "grid": np.array([["a", "b"]]),
    "scalar": np.array("a"),
}


@pytest.mark.parametrize("name", WITHOUT_ORDER)
def test_texts_without_an_order_or_a_length__are_refused(encoder, name):
    texts = WITHOUT_ORDER[name]
    with pytest.raises(TextEncoderError, match="whose order says which image each is for"):
        encoder(IMAGES, texts)
    with pytest.raises(TextEncoderError, match="whose order says"), encoder.condition(texts):
        pass
    with pytest.raises(TextEncoderError, match="whose order says"):
        encoder.text_encoder.encode(texts)


def test_a_mapping__is_a_tokenised_batch_and_never_its_keys(encoder):
    for mapping in ({"a": 1, "b": 2}, collections.UserDict(a="x")):
        with pytest.raises(TextEncoderError, match="not a tokenised batch"):
            encoder(IMAGES, mapping)


WRONG = {
    "bytes": b"ab",
    "one bytes": [b"a", b"b"],
    "bytearray": bytearray(b"ab"),
    "none inside": ["a", None],
    "nan": pandas.Series(["a", float("nan")]),
    "number": 7,
    "object": SimpleNamespace(),
    "empty": ["a", ""],
    "blank": ["a", " \n"],
    "nested": [["a"], ["b"]],
    "tensors": [torch.zeros(4), torch.zeros(4)],
    "array": np.zeros((2, 4), dtype=np.float32),
    "surrogate": ["a", "half \ud83d"],
    "none at all": [],
    "three": ["a", "b", "c"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_texts__are_refused_before_any_compute(encoder, name):
    ran: list[int] = []
    handle = next(encoder.vit.children()).register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises((TextEncoderError, ShapeError)):
        encoder(IMAGES, WRONG[name])
    handle.remove()
    assert ran == []
    assert encoder.conditioning.scope() is None


# Features


def features(**entries: Any) -> torch.Tensor:
    found = torch.randn(2, 4)
    for value in entries.values():
        found[1, 2] = value
    return found


BAD = {
    "nan": features(value=float("nan")),
    "inf": features(value=float("inf")),
    "half inf": features(value=1e6).half(),
    "large": features(value=1e25),
    "wide": features().double() * 1e100,
    "int": torch.zeros(2, 4, dtype=torch.long),
    "bool": torch.zeros(2, 4, dtype=torch.bool),
    "complex": torch.zeros(2, 4, dtype=torch.complex64),
    "sparse": torch.randn(2, 4).to_sparse(),
    "width": torch.randn(2, 5),
    "one axis": torch.randn(4),
    "three axes": torch.randn(2, 1, 4),
    "no axis": torch.tensor(1.0),
    "none at all": torch.zeros(0, 4),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_features__are_refused_before_any_compute(encoder, name):
    with pytest.raises((TextEncoderError, ShapeError)):
        encoder(IMAGES, BAD[name])
    with pytest.raises(CoVFTError), encoder.condition(BAD[name]):
        encoder.vit(IMAGES)
    with pytest.raises(MissingContextError):
        encoder.vit(IMAGES)


def test_bad_features__are_named_by_row(encoder):
    wrong = torch.randn(20, 4)
    wrong[3, 0], wrong[17] = float("nan"), float("inf")
    with pytest.raises(TextEncoderError, match="rows 3, 17 are not"):
        encoder.condition(wrong).__enter__()


def test_features__may_need_a_gradient_and_have_other_types(encoder):
    text = torch.randn(2, 4, requires_grad=True)
    wanted = encoder(IMAGES, text)
    (wanted * torch.randn_like(wanted)).sum().backward()  # the sum alone hardly depends on anything after a norm
    assert text.grad.abs().sum() > 0
    for same in (text.double(), torch.nn.Parameter(text.detach()), text.detach().t().contiguous().t()):
        assert torch.allclose(encoder(IMAGES, same), wanted, atol=1e-6)
    assert encoder(IMAGES, text.half()).dtype == torch.float32
    assert encoder(IMAGES[:0], text[:0]).shape[0] == 0
