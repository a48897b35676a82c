"""Finds the answers in a rendered conversation by probing the chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from covft.data.broken import DataError
from covft.data.chat_template import ChatTemplate, any_of
from covft.errors import ConfigError
from covft.utils.arguments import check_kinds

Span = tuple[int, int]


class AnswersNotFoundError(ConfigError):
    """The chat template does not write the answers as they are, or the text around them depends on them."""


@check_kinds
def answer_spans(
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    *,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
) -> tuple[str, list[Span]]:
    """Render a conversation and find the text that the assistant has to write.

    A second rendering, with a marker in place of every answer, shows the text around the answers; the conversation must
    consist of exactly this text and the answers. An answer begins where the prompt for it (the messages before it,
    rendered for generation) ends, and ends after its end-of-turn token.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: Chat messages with at least one answer.
        chat_template: A template instead of the tokenizer's own, or the name of one of several.
        end_of_turn: Text that ends an answer. None looks for a special token right after it.

    Returns:
        The text, and (start, end) of each answer in it, in characters.

    Raises:
        AnswersNotFoundError: If the answers cannot be found in the rendered text.
        ConfigError: If no special token ends an answer, or they do not all end alike.
        DataError: If the template refuses the conversation.
    """
    if not messages:
        raise DataError("The conversation is empty.", expected="messages with at least one answer", got="none")
    template = ChatTemplate(tokenizer, chat_template)
    text = template.render(messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    # Letters and digits only, so that no template trims or escapes them; and not in the conversation itself.
    name = "answer"
    while name in text:
        name += "z"
    marks = {number: f"Qz{number}{name}{number}zQ" for number in answers}
    probe = [{**message, "content": marks.get(number, message["content"])} for number, message in enumerate(messages)]
    pieces = template.pieces(probe, marks.values())
    spans = _place(text, pieces, [messages[number]["content"] for number in answers]) if pieces else None
    if not spans or not pieces:
        raise AnswersNotFoundError(
            "The answers cannot be found in the conversation as the chat template renders it.",
            expected="a template that writes each answer once, in full, and the same text around any answer",
            got=f"{len(answers)} answers in {_short(text)}",
            fix="a template with {% generation %} marks around the answers, or one of covft.data.CHAT_TEMPLATES",
        )
    end = find_end_of_turn(tokenizer, pieces[-1]) if end_of_turn is None else end_of_turn
    endings = [piece for piece in pieces[1:] if not piece.startswith(end)]
    if endings:
        raise ConfigError(
            f"Not every answer ends with {end!r} in this chat template.",
            got=", ".join(repr(piece[:40]) for piece in endings),
            fix="end_of_turn=...",
        )
    found, earliest = [], 0
    for number, (start, stop) in zip(answers, spans, strict=True):
        prompt = template.render(messages[:number], prompt=True)
        if earliest <= len(prompt) < start and text.startswith(prompt):
            # Without a generation prompt in the template, the prompt ends before the name of the assistant's role.
            has_generation_prompt = prompt != template.render(messages[:number])
            if has_generation_prompt or not text[len(prompt) : start].strip():
                start = len(prompt)
        earliest = stop + len(end)
        found.append((start, earliest))
    return text, found


def find_end_of_turn(tokenizer: Any, after: str) -> str:
    """Find the special token that ends an answer, with the blanks before it, in the text after the last answer.

    Raises:
        ConfigError: If no special token follows the answer: a model would not learn to stop.
    """
    special = [*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_decoder", {}).values()]
    found = re.match(rf"\s*(?:{any_of(map(str, special))})", after)
    if found is None:
        raise ConfigError(
            "No special token follows an answer in this chat template, so a model trained with it would never stop.",
            expected=f"{getattr(tokenizer, 'eos_token', None)!r} or another special token after the last answer",
            got=repr(after),
            fix='chat_template=covft.data.CHAT_TEMPLATES["vicuna_v1"], or end_of_turn="..." (or "") if you know',
        )
    return found[0]


def _place(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """Spans of the contents, if the text is the pieces with the contents, trimmed or not, between them."""
    if not text.startswith(pieces[0]):
        return None
    at, spans = len(pieces[0]), []
    for content, piece in zip(contents, pieces[1:], strict=True):
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(form + piece, at):
                break
        else:
            return None
        spans.append((at, at + len(form)))
        at += len(form) + len(piece)
    return spans if at == len(text) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}")
