"""Learns how a chat template marks user turns in decoded prompts.

The template renders conversations of known words, which then pass through the tokenizer and back. The text between the
words holds the marks. They are kept as chunks without white space, because tokenizers add and drop it around special
tokens.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from covft.data.chat_template import ChatTemplate, any_of, round_trip
from covft.errors import ConfigError

Chunks = tuple[str, ...]

_IMAGE_MARK = re.compile(r"<.*(?:img|image|vision|row_\d).*>")  # not every tokenizer calls them special
_WORDS = ("zebra", "walrus", "falcon", "badger", "otter", "heron")


@dataclass(frozen=True)
class TurnMarks:
    """The marks of a chat template, each a tuple of chunks.

    Attributes:
        start: Mark before the text of a user.
        end: Mark that ends it, whatever follows; empty without one.
        answer_start: Mark before an answer, after `end`; empty if `end` is all there is.
        answer_end: Mark that ends an answer; empty without one.
        system: Marks around a system prompt inside a user's turn; two empty tuples where nothing separates the two,
            None where the system prompt stands elsewhere.
    """

    start: Chunks
    end: Chunks
    answer_start: Chunks
    answer_end: Chunks = ()
    system: tuple[Chunks, Chunks] | None = None

    def system_prompt(self) -> re.Pattern[str] | None:
        """Build the pattern of a marked system prompt at the start of a user's turn; None without marks."""
        if self.system is None or not any(self.system):
            return None
        before, after = (pattern(chunks) for chunks in self.system)
        return re.compile(rf"\A\s*{before}.*?" + (after or r"\n\s*\n"), re.DOTALL)


def pattern(chunks: Chunks) -> str:
    """Build a regular expression for chunks with any white space between them."""
    if not chunks:
        return ""
    body = r"\s*".join(map(re.escape, chunks))
    before = r"(?<!\w)" if re.match(r"\w", chunks[0]) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", chunks[-1]) else ""
    return before + body + after


def learn_marks(tokenizer: Any, template: str | Mapping[str, str] | None = None) -> TurnMarks:
    """Learn the marks of a chat template by probing it.

    Args:
        tokenizer: A tokenizer of transformers.
        template: As in `covft.data.chat_template.ChatTemplate`.

    Raises:
        ConfigError: If there is no template, or it does not mark user turns.
    """
    return _Probe(ChatTemplate(tokenizer, template)).marks()


def special_strings(tokenizer: Any) -> set[str]:
    """Collect the special tokens as they look in decoded text, and the marks of images and tiles."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = (token.content for token in added if token.special or _IMAGE_MARK.fullmatch(token.content))
    return {*tokenizer.all_special_tokens, *marks}


class _Probe:
    """Renders conversations of known words and splits the text between them into chunks."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.tokenizer = template, template.tokenizer
        self.special = re.compile(any_of(special_strings(self.tokenizer)))
        self.words = dict(zip("uaUAvs", _words(self.tokenizer, template.template), strict=False))

    def marks(self) -> TurnMarks:
        asked = self.between("uaUAv", prompt=True)
        if asked is None or len(self.words) < len(_WORDS):
            raise ConfigError(
                "The chat template cannot be probed.",
                expected="a template that renders user and assistant turns, and a tokenizer that can spell them",
                got=repr(self.template.template)[:80],
            )
        before, question_to_answer, answer_to_question = asked[:3]
        opening, closing = answer_to_question, (self.between("ua") or [()])[-1]
        if opening[: len(closing)] == closing:
            opening = opening[len(closing) :]
        bos_eos = {self.tokenizer.bos_token, self.tokenizer.eos_token}
        start = _common_prefix(opening[::-1], before[::-1])[::-1] or opening
        while start and start[0] in bos_eos:
            start = start[1:]
        closed = self.between("uaUAv")
        end = () if closed is None else _common_prefix(question_to_answer, closed[-1])
        answer_start = question_to_answer[len(end) :]
        unknown = getattr(self.tokenizer, "unk_token", None)
        if not start or not (end or answer_start) or unknown in (*start, *(end or answer_start)):
            raise ConfigError(
                "The chat template does not mark user turns, or the tokenizer cannot spell the marks.",
                expected="marks before and after a user's text",
                got=f"before: {' '.join(start) or 'nothing'}; after: {' '.join(question_to_answer) or 'nothing'}",
            )
        answer_end = _common_prefix(closing, answer_to_question[: len(answer_to_question) - len(start)])
        return TurnMarks(start, end, answer_start, answer_end, self._system(start))

    def _system(self, start: Chunks) -> tuple[Chunks, Chunks] | None:
        rendered = self.between("su", prompt=True)
        if rendered is None:
            return None
        before, between = rendered[:2]
        if between[-len(start) :] == start:
            return None
        ends = [i for i in range(len(start), len(before) + 1) if before[i - len(start) : i] == start]
        return (before[ends[-1] :], between) if ends else None

    def between(self, turns: str, *, prompt: bool = False) -> list[Chunks] | None:
        """Find the chunks before, between and after the words of a conversation; None if it cannot be rendered."""
        roles = {"u": "user", "v": "user", "a": "assistant", "s": "system"}
        try:
            said = [(roles[turn.lower()], self.words[turn]) for turn in turns]
            messages = [{"role": role, "content": word} for role, word in said]
            pieces = self.template.pieces(messages, [word for _, word in said], prompt=prompt, spelled=True)
        except Exception:  # foreign conversation objects refuse a role in their own ways
            return None
        return None if pieces is None else [self._chunks(piece) for piece in pieces]

    def _chunks(self, text: str) -> Chunks:
        chunks: list[str] = []
        position = 0
        for match in self.special.finditer(text):
            chunks += [*text[position : match.start()].split(), match[0]]
            position = match.end()
        return tuple(chunks + text[position:].split())


def _words(tokenizer: Any, template: str) -> list[str]:
    """Choose words that survive the tokenizer and occur neither in the template nor in one another."""
    taken: list[str] = []
    vocabulary = (token for token in sorted(tokenizer.get_vocab()) if token.isalpha() and len(token) > 2)
    for word in itertools.chain(_WORDS, vocabulary):
        if len(taken) == len(_WORDS):
            break
        overlaps = word in template or any(word in other or other in word for other in taken)
        if not overlaps and round_trip(tokenizer, word).strip() == word:
            taken.append(word)
    return taken


def _common_prefix(one: Chunks, other: Chunks) -> Chunks:
    pairs = zip(one, other, strict=False)
    return tuple(chunk for chunk, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
