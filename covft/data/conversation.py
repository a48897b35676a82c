"""Encodes conversations as token ids and labels, and extracts the instruction for the text encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from covft.data.broken import DataError
from covft.data.chat_template import ChatTemplate, any_of
from covft.data.checks import function, short, string
from covft.data.rows import IMAGE_TAG, Row, parse_row, parse_turns
from covft.data.spans import AnswersNotFoundError, Span, answer_spans
from covft.data.turns import check_messages
from covft.errors import ConfigError
from covft.utils.arguments import check_kinds

IGNORE_INDEX = -100
TURNS = ("all", "first", "last")


class Encoded(NamedTuple):
    """A tokenized conversation.

    Attributes:
        input_ids: Shape `(L,)`, int64.
        labels: `input_ids` for the tokens of answers and their ends, -100 elsewhere; shape `(L,)`, int64.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


def to_messages(row: Row | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Convert a row to chat messages `{"role": "system" | "user" | "assistant", "content": ...}`.

    Args:
        row: A `Row`, a record in LLaVA's format, or its list of turns (chat messages, too).

    Raises:
        DataError: If the row is malformed; see `covft.data.parse_row`.
    """
    if isinstance(row, Row):
        return [dict(message) for message in row.messages]
    if isinstance(row, Mapping):
        return [dict(message) for message in parse_row(row).messages]
    return parse_turns(row)


def instruction_text(
    row: Row | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    turns: str = "all",
    *,
    placeholders: Sequence[str] = (IMAGE_TAG,),
) -> str:
    r"""Extract the text for the text encoder: the user's turns, without image placeholders.

    Args:
        row: As in `to_messages`.
        turns: `"all"` joins the user's turns with spaces, as the paper's authors do; `"first"` and `"last"` take one.
        placeholders: Image placeholders to remove, with the line break after them.

    Returns:
        The text; empty if the user's turns hold only images.

    Raises:
        ConfigError: If `turns` is not known.
        DataError: If the row is malformed.

    Example:
        >>> turns = [{"from": "human", "value": "<image>\nWhat is left?"}, {"from": "gpt", "value": "A cup."}]
        >>> instruction_text(turns)
        'What is left?'
    """
    if not isinstance(turns, str) or turns not in TURNS:
        raise ConfigError(
            f"turns={short(turns)} is not known.", expected=" | ".join(TURNS), got=short(turns), fix="turns='all'"
        )
    if isinstance(placeholders, str) or not isinstance(placeholders, Sequence):
        raise ConfigError("placeholders is not a list.", expected="a list of strings", got=short(placeholders))
    placeholders = [string(mark, "a placeholder") for mark in placeholders]
    said = [message["content"] for message in to_messages(row) if message["role"] == "user"]
    chosen = {"all": said, "first": said[:1], "last": said[-1:]}[turns]
    return " ".join(filter(None, (_without(turn, placeholders) for turn in chosen)))


@check_kinds
def encode_conversation(
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    *,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
) -> Encoded:
    """Encode a conversation, with labels for the answers and the tokens that end them.

    Probing the template finds the answers (`covft.data.answer_spans`). Where that fails because the template rewrites
    them, its `{% generation %}` marks decide, if it has any.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: Chat messages with at least one answer; image placeholders are already expanded.
        chat_template: A template instead of the tokenizer's own, or the name of one of several.
        end_of_turn: Text that ends an answer. None looks for a special token right after it.

    Raises:
        ConfigError: If the answers cannot be found in this template.
        DataError: If the template refuses the conversation, or a token spans the boundary of an answer.

    Example:
        >>> ids, labels = encode_conversation(tokenizer, to_messages(row))
        >>> tokenizer.decode(labels[labels != -100])
        'A spoon.<|im_end|>'
    """
    function(tokenizer, "tokenizer")
    messages = check_messages(messages)
    for name, value in (("chat_template", chat_template), ("end_of_turn", end_of_turn)):
        if value is not None:
            string(value, name)
    try:
        text, spans = answer_spans(tokenizer, messages, chat_template=chat_template, end_of_turn=end_of_turn)
    except AnswersNotFoundError:
        template = ChatTemplate(tokenizer, chat_template)
        if end_of_turn is not None or not _GENERATION.search(template.template):
            raise
        return _by_marks(template, messages)
    return label_spans(tokenizer, text, spans)


def label_spans(tokenizer: Any, text: str, spans: Sequence[Span]) -> Encoded:
    """Tokenize a text and label the tokens inside the spans.

    Slow tokenizers do not report offsets, so the tokens before each boundary are counted.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The complete text, special tokens included.
        spans: (start, end) in characters, in order.

    Raises:
        DataError: If a token crosses the boundary of a span, white space aside.
    """
    offsets = _offsets(tokenizer, text)
    if offsets is not None:
        ids, places = offsets
        learned = [_inside(text, place, spans) for place in places]
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        learned = [False] * len(ids)
        for start, end in spans:
            for number in range(_count(tokenizer, text, start, ids), _count(tokenizer, text, end, ids)):
                learned[number] = True
    input_ids = torch.tensor(ids, dtype=torch.int64)
    return Encoded(input_ids, input_ids.masked_fill(~torch.tensor(learned, dtype=torch.bool), IGNORE_INDEX))


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _without(text: str, placeholders: Sequence[str]) -> str:
    if not any(mark in text for mark in placeholders):
        return text.strip()
    return re.sub(" {2,}", " ", re.sub(rf"(?:{any_of(placeholders)})\n?", "", text)).strip()


def _offsets(tokenizer: Any, text: str) -> tuple[list[int], list[Span]] | None:
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [tuple(place) for place in encoded["offset_mapping"]]


def _inside(text: str, place: Span, spans: Sequence[Span]) -> bool:
    """Whether a token lies in a span; blanks before an answer may be part of its first token."""
    left, right = place
    for start, end in spans:
        if left == right:
            if start <= left < end:  # a blank that the tokenizer adds belongs to the next token
                return True
        elif left < end and start < right:
            if text[left:start].strip() or text[end:right].strip():
                raise DataError(
                    f"The token {text[left:right]!r} lies partly inside and partly outside an answer.",
                    expected="a chat template with a blank or a special token before and after answers",
                )
            return True
    return False


def _count(tokenizer: Any, text: str, boundary: int, ids: list[int]) -> int:
    """Count the tokens before a boundary; blanks at it may belong to the next token."""
    bare = len(text[:boundary].rstrip())
    for at in dict.fromkeys((boundary, bare)):
        before = tokenizer(text[:at], add_special_tokens=False)["input_ids"]
        if ids[: len(before)] == before:
            return len(before)
    raise DataError(
        f"The tokens before {text[boundary : boundary + 20]!r} depend on the text after them.",
        expected="a fast tokenizer, which reports offsets, or a template with special tokens around answers",
    )


def _by_marks(template: ChatTemplate, messages: Sequence[dict[str, str]]) -> Encoded:
    encoded = template.apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    input_ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    learned = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
    runs = int(learned[:1].sum() + (learned[1:] & ~learned[:-1]).sum())
    answers = sum(message["role"] == "assistant" for message in messages)
    if runs != answers:
        raise ConfigError(
            "The {% generation %} marks of the chat template do not enclose the answers.",
            expected=f"{answers} runs of tokens, one per answer",
            got=runs,
        )
    return Encoded(input_ids, input_ids.masked_fill(~learned, IGNORE_INDEX))
