"""Whether an answer is right: exact match, option letters, pairs."""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Sequence
from typing import Any

from covft.errors import ConfigError, ShapeError
from covft.utils.arguments import check_kinds, short


@check_kinds
def exact_match(answer: str, expected: str | Sequence[str]) -> bool:
    """Return whether an answer is one of the expected ones.

    Case, runs of white space and a final full stop do not count; everything else does.

    Args:
        answer: What the model said.
        expected: The right answer, or several that are all right.

    Example:
        >>> exact_match(" Two  cups.", "two cups")
        True
        >>> exact_match("2", ["two", "2"])
        True
    """
    right = [expected] if isinstance(expected, str) else expected
    return _plain(answer) in {_plain(one) for one in right}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


@check_kinds
def option_letter(answer: str, options: Sequence[str]) -> str | None:
    """Find the option that an answer to a multiple-choice question chooses.

    The rule, in the manner of the matching by rules that MMBench's scorers do before they ask a language model:

    1. An answer that is a single letter, in either case and perhaps with punctuation, chooses that option.
    2. Otherwise capital letters of options that stand alone count, as in `(B)`, `B.` or `the answer is B`. "A" and "I"
       followed by a word are words themselves, as in "A cup", unless that word is "or" or "and", or "is", "option" or
       "answer" comes directly before them. One letter, however often, chooses; several different ones choose none.
    3. Without any letter, the text of an option counts where it stands in the answer in full words; case does not
       matter. An option whose text is part of another found one does not count. One text chooses; several choose none.

    Args:
        answer: What the model said.
        options: The texts of the options A, B, C and so on; empty strings where the letters alone count.

    Returns:
        The letter, or None where none or several are chosen.

    Raises:
        ConfigError: If there are no options, or more than letters.

    Example:
        >>> option_letter("The answer is (B).", ["cup", "red cup"])
        'B'
        >>> option_letter("I see a red cup", ["cup", "red cup"])
        'B'
    """
    if not 1 <= len(options) <= len(string.ascii_uppercase):
        raise ConfigError(f"{len(options)} options cannot be lettered.", expected="1 to 26 options", got=len(options))
    letters = string.ascii_uppercase[: len(options)]
    alone = re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", answer)
    if alone:
        return alone[1].upper() if alone[1].upper() in letters else None
    marked = {match[0] for match in _LETTER.finditer(answer) if match[0] in letters and not _is_word(match)}
    if marked:
        return marked.pop() if len(marked) == 1 else None
    return _option_by_text(answer, dict(zip(letters, options, strict=True)))


_LETTER = re.compile(r"(?<![\w'\u2019-])[A-Z](?![\w'\u2019-])")


def _is_word(letter: re.Match[str]) -> bool:
    """Whether "A" is an article, or "I" a pronoun."""
    before, after = letter.string[: letter.start()], letter.string[letter.end() :]
    announced = re.search(r"\b(?:is|option|answer)\W*$", before, flags=re.IGNORECASE)
    return letter[0] in "AI" and not announced and re.match(r" +(?!(?:or|and|[A-Z])\b)\w", after) is not None


def _option_by_text(answer: str, options: dict[str, str]) -> str | None:
    said = _words(answer)
    found = {letter: words for letter, text in options.items() if (words := _words(text)).strip() and words in said}
    longest = [
        letter
        for letter, words in found.items()
        if not any(words != other and words in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _words(text: str) -> str:
    """Return the words in lower case, one space before and after each."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


@check_kinds
def pair_hits(hits: Sequence[Any], pairs: Sequence[Hashable] | None = None) -> list[bool]:
    """Return for each pair of questions whether both answers are right, as MMVP scores near-identical pictures.

    Args:
        hits: Whether each answer is right, by question.
        pairs: The pair that each question belongs to, such as a number; by default 0 and 1, 2 and 3 and so on.

    Returns:
        One entry per pair, in the order in which the pairs first appear.

    Raises:
        ShapeError: If a pair does not have two questions, or hits are not true, false, 1 or 0.

    Example:
        >>> pair_hits([True, True, False, True])
        [True, False]
    """
    right = _truths(hits)
    names = [number // 2 for number in range(len(hits))] if pairs is None else list(pairs)
    if len(names) != len(hits):
        raise ShapeError("Each question belongs to a pair.", expected=f"{len(hits)} pairs", got=f"{len(names)}")
    members: dict[Hashable, list[bool]] = {}
    for name, hit in zip(names, right, strict=True):
        members.setdefault(name, []).append(hit)
    for name, both in members.items():
        if len(both) != 2:
            raise ShapeError(f"Pair {short(name)} cannot be scored.", expected="2 questions", got=len(both))
    return [all(both) for both in members.values()]


def _truths(hits: Sequence[Any]) -> list[bool]:
    """Return hits as True and False; the text "0" would count as true."""
    wrong = [hit for hit in hits if isinstance(hit, str) or hit not in (0, 1)]
    if wrong:
        raise ShapeError("An answer is right or not.", expected="True, False, 1 or 0", got=short(wrong[0]))
    return [bool(hit) for hit in hits]


@check_kinds
def paired_accuracy(hits: Sequence[Any], pairs: Sequence[Hashable] | None = None) -> float:
    """Return the share of pairs of which both answers are right, from 0 to 1.

    Args:
        hits: Whether each answer is right, by question.
        pairs: The pair that each question belongs to, as `pair_hits` takes it.

    Raises:
        ShapeError: If there are no pairs, or a pair does not have two questions.

    Example:
        >>> paired_accuracy([True, True, False, True])
        0.5
    """
    both = pair_hits(hits, pairs)
    if not both:
        raise ShapeError("The accuracy of no pairs is not a number.", expected="at least 2 questions", got=0)
    return sum(both) / len(both)
