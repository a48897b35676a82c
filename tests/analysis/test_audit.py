import numpy as np
import pytest
import torch

import covft
from covft.analysis.audit import audit, compare
from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.metrics import holm, paired_bootstrap
from covft.testing import HashTextEncoder, tiny_llava
from tests.helpers.snapshots import assert_unchanged, snapshot


@pytest.fixture
def tiny():
    tiny = tiny_llava(depth=3)
    covft.attach(tiny.model, HashTextEncoder(8), tokenizer=tiny.tokenizer, layers=[1], experts=2)
    return tiny


def entries(tiny, count=6):
    pixels = [torch.randn(1, 3, 32, 32) for _ in range(count // 2)]
    asked = [(f"what is thing {i}?", "a") for i in range(count)]
    return [
        {**tiny.batch([q], answers=[a]), "context_text": [q], "pixel_values": pixels[i // 2]}
        for i, (q, a) in enumerate(asked)
    ]


def test_the_tower_alone_is_told_another_text(tiny):
    told, prompts = {}, {}

    def score(model, entry, text):
        own = entry["context_text"][0]
        told.setdefault(own, []).append(text)
        prompts.setdefault(own, []).append(entry["input_ids"])
        return isinstance(text, str) and text == own

    before = snapshot(tiny.model.train())
    found = audit(tiny.model, entries(tiny), score=score, generic="look")
    assert_unchanged(tiny.model, before)
    for own, (right, swapped, generic, blank) in told.items():
        assert (right, generic) == (own, "look")
        assert swapped in set(told) - {own}
        assert torch.equal(blank, torch.zeros(1, 8))
        assert all(ids is prompts[own][0] for ids in prompts[own])
    assert {name: mean.mean for name, mean in found.means.items()} == {
        "right": 1.0, "swapped": 0.0, "generic": 0.0, "blank": 0.0,
    }  # fmt: skip
    assert found.uses_text
    assert found.images == 3, "two questions about each picture"
    assert found.consistency == {"right": 1.0, "swapped": 0.0, "generic": 0.0, "blank": 0.0}
    assert str(found).startswith("The conditioning is used.")


def test_answers_are_scored_word_by_word(tiny):
    asked = entries(tiny)
    found = audit(tiny.model, asked)
    with torch.no_grad():
        for entry, right in zip(asked, _in_order(found.scores["right"], asked), strict=True):
            logits = tiny.model(**entry).logits
            [places] = (entry["labels"][0, 1:] != -100).nonzero(as_tuple=True)
            hits = [int(logits[0, place].argmax()) == int(entry["labels"][0, place + 1]) for place in places]
            assert right == float(all(hits))
    assert not found.uses_text


def _in_order(scores, asked):
    """Scores in the order of the entries, which are drawn in a random one."""
    order = np.random.default_rng(0).permutation(len(asked))
    return scores[np.argsort(order)]


def test_scores_are_compared_question_by_question():
    draws = np.random.default_rng(0)
    scores = {name: draws.integers(0, 2, 40).astype(float) for name in ("right", "swapped", "generic", "blank")}
    images = [i // 3 for i in range(40)]
    found = compare(scores, images)
    p_values = []
    for name in ("swapped", "generic", "blank"):
        difference = paired_bootstrap({0: {"score": scores["right"]}}, {0: {"score": scores[name]}})
        assert found.differences[name] == difference
        p_values.append(difference.p_value)
    assert list(found.p_values.values()) == holm(p_values)
    whole = [all(scores["blank"][3 * i : 3 * i + 3]) for i in range(13)]
    assert found.consistency["blank"] == np.mean(whole)
    assert found.images == 13, "the last picture has one question"
    assert compare(scores, list(range(40))).consistency is None


def test_what_cannot_be_audited_is_refused(tiny):
    asked = entries(tiny)
    with pytest.raises(UnsupportedViTError, match="reads no text"):
        audit(tiny_llava(depth=2).model, asked)
    with pytest.raises(ConfigError, match="all the same"):
        audit(tiny.model, asked[:1] * 3)
    with pytest.raises(ConfigError, match="6 of 6 without"):
        audit(tiny.model, [{k: v for k, v in e.items() if k != "context_text"} for e in asked])
    with pytest.raises(ShapeError, match="score cannot be used"):
        audit(tiny.model, asked, score=lambda model, entry, text: float("nan"))
