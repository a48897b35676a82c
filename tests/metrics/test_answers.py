"""Scores of answers."""

import numpy as np
import pytest

from covft.errors import ArgumentError, ConfigError, ShapeError
from covft.metrics import exact_match, option_letter, pair_hits, paired_accuracy

OPTIONS = ["cup", "red cup", "dog", "two dogs"]


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("cup", "cup", True),
        (" A  red\tCup. ", "a red cup", True),
        ("cup", "cups", False),
        ("a cup", "cup", False),
        ("3.5", "35", False),
        ("cup..", "cup", False),
        ("2", ["two", "2"], True),
        ("3", ["two", "2"], False),
        ("cup", [], False),
        ("", "", True),
    ],
)
def test_exact_match_ignores_case_space_and_a_full_stop_alone(answer, expected, right):
    assert exact_match(answer, expected) is right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # a letter alone
        ("B", "B"),
        ("b.", "B"),
        (" (c) ", "C"),
        ("**D**", "D"),
        ("E", None),
        # letters among words
        ("B. red cup", "B"),
        ("The answer is (C).", "C"),
        ("Answer: A", "A"),
        ("The answer is A because of its handle", "A"),
        ("A: the cup", "A"),
        ("Option A and nothing else", "A"),
        ("C, so C", "C"),
        ("B A", None),
        ("A or B", None),
        ("A B", None),
        ("A and its handle", "A"),
        ("not C but D", None),
        # words that are no letters of options
        ("A dog", "C"),
        ("A-B street, a T-shirt, D's", None),
        ("The DOG", "C"),
        # texts
        ("I see a red cup", "B"),
        ("it is a cup", "A"),
        ("a cup and a dog", None),
        ("There are two dogs here.", "D"),
        ("a cupboard", None),
        ("", None),
        ("I do not know", None),
    ],
)
def test_option_letter_by_the_rule(answer, letter):
    assert option_letter(answer, OPTIONS) == letter


def test_i_is_an_option_of_nine_and_a_pronoun():
    options = [f"thing {number}" for number in range(9)]
    assert option_letter("I", options) == "I"
    assert option_letter("I think it is H", options) == "H"
    assert option_letter("the answer is I", options) == "I"


def test_empty_texts_leave_the_letters():
    assert option_letter("B", ["", ""]) == "B"
    assert option_letter("something else", ["", ""]) is None


def test_equal_texts_choose_none():
    assert option_letter("a cup", ["cup", "cup", "dog"]) is None


@pytest.mark.parametrize("count", [0, 27])
def test_options_have_letters(count):
    with pytest.raises(ConfigError, match="lettered"):
        option_letter("A", ["x"] * count)


def test_pairs_are_right_when_both_answers_are():
    assert pair_hits([1, 1, 0, 1, 1, 0, 0, 0]) == [True, False, False, False]
    assert paired_accuracy([1, 1, 0, 1, 1, 0, 0, 0]) == 0.25
    assert paired_accuracy(np.array([True, True])) == 1.0


def test_pairs_may_be_named_in_any_order():
    hits, pairs = [True, False, True, True, True, True], ["x", "y", "z", "x", "y", "z"]
    assert pair_hits(hits, pairs) == [True, False, True]


@pytest.mark.parametrize(
    ("hits", "pairs"), [([1, 1, 1], None), ([1, 1], [0]), ([1, 1], [0, 1]), ([1] * 4, [0, 0, 0, 1]), ([1] * 3, [0] * 3)]
)
def test_a_pair_has_two_questions(hits, pairs):
    with pytest.raises(ShapeError):
        pair_hits(hits, pairs)


@pytest.mark.parametrize("hits", [["0", "1"], [1, None], [0.5, 1], [2, 1], np.array(["0", "1"])])
def test_hits_are_truths(hits):
    with pytest.raises(ShapeError, match="right or not"):
        pair_hits(hits)


def test_no_pairs_have_no_accuracy():
    assert pair_hits([]) == []
    with pytest.raises(ShapeError, match="no pairs"):
        paired_accuracy([])


@pytest.mark.parametrize(("answer", "expected"), [(1, "1"), ("1", 1), ("1", [1]), (None, "a")])
def test_answers_are_texts(answer, expected):
    with pytest.raises(ArgumentError):
        exact_match(answer, expected)
