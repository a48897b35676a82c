"""Functions as text encoders."""

import numpy as np
import pytest
import torch
from torch import nn

from covft.errors import ArgumentError, ShapeError, TextEncoderError
from covft.text import CallableTextEncoder


def embed(texts):
    return torch.ones(len(texts), 5)


def test_width_and_name_come_from_the_function():
    encoder = CallableTextEncoder(embed)
    assert (encoder.text_dim, encoder.name) == (5, "callable:embed")
    assert repr(encoder) == "CallableTextEncoder('callable:embed', text_dim=5)"


def test_the_width_costs_one_call_and_none_where_it_is_given():
    calls = []

    def function(texts):
        calls.append(texts)
        return embed(texts)

    CallableTextEncoder(function)
    assert len(calls) == 1
    assert len(calls[0]) == 1
    CallableTextEncoder(function, text_dim=5)
    assert len(calls) == 1


def test_arrays_are_taken_too():
    encoder = CallableTextEncoder(lambda texts: np.ones((len(texts), 3), dtype=np.float32))
    assert torch.equal(encoder.encode(["a", "b"]), torch.ones(2, 3))


def test_a_function_that_knows_only_its_own_texts_says_how_to_give_the_width():
    table = {"known": torch.ones(3)}

    def look_up(texts):
        return torch.stack([table[text] for text in texts])

    with pytest.raises(TextEncoderError, match="text_dim=C") as caught:
        CallableTextEncoder(look_up)
    assert isinstance(caught.value.__cause__, KeyError)
    assert torch.equal(CallableTextEncoder(look_up, text_dim=3).encode(["known"]), torch.ones(1, 3))


def test_one_row_for_a_list_is_refused_at_once():
    with pytest.raises(ShapeError, match=r"Got:\s+\(3,\)"):
        CallableTextEncoder(lambda texts: torch.ones(3))


def test_an_object_that_is_not_callable_is_refused():
    with pytest.raises(ArgumentError, match="cannot use function='embed'"):
        CallableTextEncoder("embed")


def test_a_module_is_in_eval_mode_at_every_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, texts):
            return self.dropout(torch.ones(len(texts), 64))

    model = Model()
    encoder = CallableTextEncoder(model, cache_bytes=0)
    model.train()
    assert torch.equal(encoder.encode(["a"]), torch.ones(1, 64))


def test_an_error_inside_the_function_reaches_the_caller_as_it_is():
    def fragile(texts):
        if texts == ["boom"]:
            raise ZeroDivisionError
        return embed(texts)

    encoder = CallableTextEncoder(fragile)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(["boom"])
