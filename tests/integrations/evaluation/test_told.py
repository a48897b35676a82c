"""Another text for the tower alone, the prompt unchanged."""

import pytest
import torch

import covft
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.evaluation.told import GENERIC, telling
from covft.integrations.mllm.attachment import attachment_of
from covft.testing import HashTextEncoder, tiny_llava
from tests.helpers.towers import perturb

QUESTIONS = ["what is left of the cup?", "how many people?"]
WARNED = "Is it red? Please answer directly with a single word or number."


@pytest.fixture
def tiny():
    tiny = tiny_llava(depth=3)
    covft.attach(tiny.model, HashTextEncoder(8), tokenizer=tiny.tokenizer, layers=[1], experts=2)
    perturb(covft.get_encoder(tiny.model), 0.3)
    return tiny


def logits(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options).logits


def test_each_text(tiny):
    model, batch = tiny.model, tiny.batch(QUESTIONS)
    reader = attachment_of(model).reader
    right = logits(model, batch)
    told = {"right": QUESTIONS, "swapped": QUESTIONS[::-1], "generic": [GENERIC] * 2, "blank": torch.zeros(2, 8)}
    for text, given in told.items():
        with telling(model, text, questions=QUESTIONS) as teller:
            found = logits(model, batch)
            answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert torch.equal(found, logits(model, batch, context_text=given)), text
        assert torch.equal(found, right) == (text == "right")
        assert torch.equal(answer, model.generate(**batch, context_text=given, max_new_tokens=3, do_sample=False))
        assert teller.counts == {name: 4 * (name == text) for name in told}
        assert attachment_of(model).reader is reader


def test_swapped__without_all_questions_it_draws_from_those_before(tiny):
    model = tiny.model
    one, two = (tiny.batch([question]) for question in QUESTIONS)
    with telling(model, "swapped") as teller:
        first, second, again = logits(model, one), logits(model, two), logits(model, one)
    assert torch.equal(first, logits(model, one, context_text=GENERIC))
    assert torch.equal(second, logits(model, two, context_text=QUESTIONS[0]))
    assert torch.equal(again, logits(model, one, context_text=QUESTIONS[1]))
    assert teller.counts == {"right": 0, "swapped": 2, "generic": 1, "blank": 0}


def test_swapped__texts_that_are_the_same_once_cleaned_are_not_another():
    tiny = tiny_llava(depth=3)
    covft.attach(tiny.model, HashTextEncoder(8), tokenizer=tiny.tokenizer, layers=[1], instructions="clean")
    with telling(tiny.model, "swapped", questions=["Is it red?", WARNED, "Where?"]) as teller:
        logits(tiny.model, tiny.batch(["Is it red? Please answer yes or no."]))
        assert teller.read(*_asked(tiny)) == ["Where?"]
    assert teller.counts["swapped"] == 2


def _asked(tiny):
    batch = tiny.batch([WARNED])
    return batch["input_ids"], [0]


def test_a_sentence_of_the_engine_is_warned_about_once(tiny):
    batch = tiny.batch([WARNED])
    with telling(tiny.model):
        with pytest.warns(UserWarning, match="'Please answer directly with a single word or number.'"):
            logits(tiny.model, batch)
        logits(tiny.model, batch)  # a warning would be an error here
    clean = tiny_llava(depth=3)
    covft.attach(clean.model, HashTextEncoder(8), tokenizer=clean.tokenizer, layers=[1], instructions="clean")
    with telling(clean.model):
        logits(clean.model, clean.batch([WARNED]))


def test_what_cannot_be_told(tiny):
    with pytest.raises(ConfigError, match="is not known"), telling(tiny.model, "wrong"):
        pass
    other = tiny_llava(depth=3)
    with pytest.raises(UnsupportedViTError, match="no tower that can be told"), telling(other.model):
        pass
    covft.attach(other.model, None, tokenizer=other.tokenizer, layers=[1], context="image")
    with pytest.raises(UnsupportedViTError, match="no tower that can be told"), telling(other.model, "blank"):
        pass
    with telling(other.model):
        logits(other.model, other.batch(QUESTIONS[:1]))
