"""CIDEr against hand-worked scores, its equations, and the reference implementation with its own tokenizer."""

import math
import random
import re
import shutil
import sys
from collections import Counter

import pytest

from covft.errors import MissingDependencyError, ShapeError
from covft.metrics import cider

CAPTIONS = [
    "A man's red-haired dog isn't running, is it?",
    "Two dogs, 3.5 metres apart.",
    "Kids - playing football!",
    "A woman holds a T-shirt; the 1950's style",
]
REFERENCES = [
    ["a red-haired dog of a man isn't running", "The man's dog stands."],
    ["two dogs: metres apart", "Dogs can't come closer, not 3.5 metres", "a dog"],
    ["children playing football", "kids playing football."],
    ["a woman with a T-shirt", "A shirt's held by a woman"],
]


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")


def equations(captions, references):
    """CIDEr-D as its paper and the reference define it; lengths are counted in pairs of words."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def weighed(text, n):
        return {
            gram: count * (math.log(len(references)) - math.log(max(1, images[gram])))
            for gram, count in grams(text, n).items()
        }

    images = Counter()
    for texts in references:
        images.update({gram for text in texts for n in range(1, 5) for gram in grams(text, n)})
    scores = []
    for caption, texts in zip(captions, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            for text in texts:
                c, s = weighed(caption, n), weighed(text, n)
                norms = math.sqrt(sum(v * v for v in c.values())) * math.sqrt(sum(v * v for v in s.values()))
                shared = sum(min(c[gram], s[gram]) * s[gram] for gram in c.keys() & s.keys())
                length = sum(grams(caption, 2).values()) - sum(grams(text, 2).values())
                total += shared / norms * math.exp(-(length**2) / (2 * 6.0**2)) if norms else 0.0
        scores.append(10 * total / (4 * len(texts)))
    return scores


def test_hand_worked_scores():
    # Three words have n-grams of three lengths out of four: 10 * 3 / 4. "two dogs" has both words of three, one pair of
    # two, and one pair less: 10 / 4 * (2 / sqrt(6) + 1 / sqrt(2)) * exp(-1 / 72).
    scores = cider(["a red cup", "two dogs"], [["a red cup"], ["two dogs run"]])
    expected = [7.5, 2.5 * (2 / math.sqrt(6) + 1 / math.sqrt(2)) * math.exp(-1 / 72)]
    assert scores == pytest.approx(expected, abs=1e-12)


def test_scores_are_those_of_the_equations():
    draw = random.Random(0)

    def sentence():
        return " ".join(draw.choices(["red", "blue", "cup", "dog", "left", "of", "two"], k=draw.randint(1, 7)))

    captions = [sentence() for _ in range(12)]
    references = [[sentence() for _ in range(draw.randint(1, 4))] for _ in captions]
    expected = equations(captions, references)
    assert cider(captions, references) == pytest.approx(expected, abs=1e-9)
    assert sum(expected) > 0
    assert len(set(expected)) > 6


def test_words_of_every_image_count_for_nothing():
    assert cider(["the cup", "the"], [["the cup"], ["the dog"]])[1] == 0.0


def test_case_and_punctuation_do_not_matter():
    plain = cider(["a man 's dog is n't red", "two dogs"], [["the man 's dog is red"], ["two dogs run"]])
    assert min(plain) > 1
    references = [["The man\u2019s dog is red."], ['"two dogs" run']]
    assert cider(["A MAN's dog isn't red!", "Two, dogs."], references) == plain


@pytest.mark.slow
def test_scores_are_those_of_the_reference_with_its_own_tokenizer():
    if shutil.which("java") is None:
        pytest.skip("the reference tokenizer needs Java")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenized(texts):
        return PTBTokenizer().tokenize({n: [{"caption": text} for text in some] for n, some in enumerate(texts)})

    _, expected = Cider().compute_score(tokenized(REFERENCES), tokenized([[caption] for caption in CAPTIONS]))
    assert min(expected) > 0
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(list(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("captions", "references"),
    [(["a"], [["a"]]), ([], []), (["a", "b"], [["a"]]), (["a", "b"], [["a"], []])],
)
def test_what_cannot_be_scored_is_refused(captions, references):
    with pytest.raises(ShapeError):
        cider(captions, references)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install "covft[metrics]"')):
        cider(["a", "b"], [["a"], ["b"]])
