"""What stands around a user's turn in a prompt, learned by probing the chat template.

Conversations of known words are rendered by the template and passed through the tokenizer and back; what
comes out between the words are the marks, as they will look in decoded prompts. Marks are kept as
chunks without white space, because tokenizers add and drop it around special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from covft.errors import ConfigError

Chunks = tuple[str, ...]

_IMAGE_MARK = re.compile(r"<.*(?:img|image|vision|row_\d).*>")  # not every tokenizer calls them special
_WORDS = ("zebra", "walrus", "falcon", "badger", "otter", "heron")


@dataclass(frozen=True)
class TurnMarks:
    """The marks of a chat template, each a tuple of chunks.

    Attributes:
        start: Before the text of a user.
        ends: Any of these ends it.
        system: Around a system prompt that stands inside a user's turn; two empty tuples where nothing
            tells the two apart, None where it stands elsewhere.
    """

    start: Chunks
    ends: tuple[Chunks, ...]
    system: tuple[Chunks, Chunks] | None = None

    def turns(self) -> re.Pattern[str]:
        """Finds the turns of users; group 1 is the text, and what stands in for it."""
        ends = "|".join(map(pattern, self.ends))
        return re.compile(rf"{pattern(self.start)}(.*?)(?={ends}|\Z)", re.DOTALL)

    def system_prompt(self) -> re.Pattern[str] | None:
        """Finds a marked system prompt at the start of a user's turn."""
        if self.system is None or not any(self.system):
            return None
        before, after = (pattern(chunks) for chunks in self.system)
        return re.compile(rf"\A\s*{before}.*?" + (after or r"\n\s*\n"), re.DOTALL)


def pattern(chunks: Chunks) -> str:
    """A regular expression for chunks with any white space between them."""
    if not chunks:
        return ""
    body = r"\s*".join(map(re.escape, chunks))
    before = r"(?<!\w)" if re.match(r"\w", chunks[0]) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", chunks[-1]) else ""
    return before + body + after


def learn_marks(tokenizer: Any, template: str | dict[str, str] | None = None) -> TurnMarks:
    """Probe a chat template.

    Args:
        tokenizer: A tokenizer of transformers.
        template: The template, or several by name; None takes the tokenizer's own.

    Raises:
        ConfigError: If there is no template, or it does not mark the turns of users.
    """
    template = template or getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name
        template = template.get("default") or next(iter(template.values()), None)
    if not template:
        raise ConfigError("The tokenizer has no chat template.", fix="tokenizer.chat_template = ...")
    specials = special_strings(tokenizer)
    for content in (str, _as_part):
        probe = _Probe(tokenizer, template, content, specials)
        if probe.works:
            return probe.marks()
    raise ConfigError(
        "The chat template cannot be probed.",
        expected="a template that renders user and assistant turns, and a tokenizer that can spell them",
        got=repr(template)[:80],
    )


def special_strings(tokenizer: Any) -> list[str]:
    """How special tokens look in decoded text, the longest first; marks of images and their tiles among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = (token.content for token in added if token.special or _IMAGE_MARK.fullmatch(token.content))
    strings = {*tokenizer.all_special_tokens, *marks}
    return sorted((string for string in strings if string), key=len, reverse=True)


class _Probe:
    """Renders conversations and reads what stands between their words.

    Args:
        tokenizer: The tokenizer.
        template: Its chat template.
        content: Makes the content of a message from a word; templates want a string or a list of parts.
        specials: How special tokens look.
    """

    def __init__(self, tokenizer: Any, template: Any, content: Callable[[str], Any], specials: list[str]) -> None:
        self.tokenizer, self.template, self.content = tokenizer, template, content
        self.special = re.compile("|".join(map(re.escape, specials))) if specials else re.compile(r"(?!)")
        self.words = _words(tokenizer, str(template))
        self.works = len(self.words) == len(_WORDS) and self.between("uaUAv", generate=True) is not None

    def marks(self) -> TurnMarks:
        asked = self.between("uaUAv", generate=True) or []
        before, question_to_answer, answer_to_question = asked[:3]
        answered = self.between("ua") or [(), (), ()]
        closed = self.between("uaUAv")
        opening = _without_prefix(answer_to_question, answered[2])
        bos_eos = {self.tokenizer.bos_token, self.tokenizer.eos_token}
        start = _common_suffix(opening, before) or opening
        while start and start[0] in bos_eos:
            start = start[1:]
        end = () if closed is None else _common_prefix(question_to_answer, closed[-1])
        answer_start = question_to_answer[len(end) :]
        ends = tuple(chunks for chunks in (end, answer_start, start) if chunks)
        unknown = getattr(self.tokenizer, "unk_token", None)
        if not start or len(ends) < 2 or unknown in (*start, *ends[0]):
            raise ConfigError(
                "The chat template does not mark the turns of users, or the tokenizer cannot spell the marks.",
                expected="marks before and after a user's text",
                got=f"before: {' '.join(start) or 'nothing'}; after: {' '.join(question_to_answer) or 'nothing'}",
            )
        return TurnMarks(start, ends, self._system(start))

    def _system(self, start: Chunks) -> tuple[Chunks, Chunks] | None:
        rendered = self.between("su", generate=True)
        if rendered is None:
            return None
        before, between = rendered[:2]
        if between[-len(start) :] == start:
            return None
        positions = [i for i in range(len(before)) if before[i : i + len(start)] == start]
        return (before[positions[-1] + len(start) :], between) if positions else None

    def between(self, turns: str, *, generate: bool = False) -> list[Chunks] | None:
        """Chunks before, between and after the words of a conversation; None if it cannot be rendered."""
        spelled = dict(zip("uaUAvs", self.words, strict=True))
        roles = {"u": "user", "a": "assistant", "s": "system"}
        messages = [{"role": roles.get(turn.lower(), "user"), "content": self.content(spelled[turn])} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=generate
            )
        except Exception:  # of foreign templates: they refuse a role or a form of content in their own ways
            return None
        text = round_trip(self.tokenizer, text)
        found: list[Chunks] = []
        for turn in turns:
            if text.count(spelled[turn]) != 1:
                return None
            piece, text = text.split(spelled[turn])
            found.append(self._chunks(piece))
        return [*found, self._chunks(text)]

    def _chunks(self, text: str) -> Chunks:
        chunks: list[str] = []
        position = 0
        for match in self.special.finditer(text):
            chunks += [*text[position : match.start()].split(), match[0]]
            position = match.end()
        return tuple(chunks + text[position:].split())


def round_trip(tokenizer: Any, text: str) -> str:
    """What is left of a text after tokenizing and decoding it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _words(tokenizer: Any, template: str) -> tuple[str, ...]:
    """Words that survive the tokenizer, do not occur in the template, and not in one another."""
    taken: list[str] = []
    vocabulary = (token for token in sorted(tokenizer.get_vocab()) if token.isalpha() and len(token) > 2)
    for candidates in (_WORDS, vocabulary):
        for word in candidates:
            if len(taken) == len(_WORDS):
                return tuple(taken)
            if word in template or any(word in other or other in word for other in taken):
                continue
            if round_trip(tokenizer, word).strip() == word:
                taken.append(word)
    return tuple(taken)


def _as_part(word: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": word}]


def _common_prefix(one: Chunks, other: Chunks) -> Chunks:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _common_suffix(one: Chunks, other: Chunks) -> Chunks:
    return _common_prefix(one[::-1], other[::-1])[::-1]


def _without_prefix(chunks: Chunks, prefix: Chunks) -> Chunks:
    return chunks[len(prefix) :] if prefix and chunks[: len(prefix)] == prefix else chunks
