"""Where the answers are in a rendered conversation, for any chat template that can be probed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from covft.data.broken import DataError
from covft.errors import ConfigError

Span = tuple[int, int]


class AnswersNotFoundError(ConfigError):
    """A chat template that writes something else depending on what the answers say."""


def render(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, chat_template: str | None = None, prompt: bool = False
) -> str:
    """A conversation as text, by the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: Chat messages.
        chat_template: A template instead of the tokenizer's own.
        prompt: Whether the text ends where the next answer begins.

    Raises:
        ConfigError: If there is no template.
        DataError: If the template refuses the conversation.
    """
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no chat template.",
            expected="tokenizer.chat_template, or chat_template=",
            fix='chat_template=covft.data.CHAT_TEMPLATES["vicuna_v1"]',
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=chat_template
        )
    except TemplateError as error:
        raise DataError(f"The chat template refuses the conversation: {error}.") from error


def answer_spans(
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    *,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
) -> tuple[str, list[Span]]:
    """Render a conversation and find what the assistant has to write in it.

    The template is probed: rendered once more with a marker in place of every answer, it shows what it writes around
    them, and the real text must be exactly these pieces with the answers between. An answer begins where the
    prompt for it (the messages before it, rendered for generation) ends, and ends behind its end-of-turn token.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: Chat messages with at least one answer.
        chat_template: A template instead of the tokenizer's own.
        end_of_turn: What ends an answer. None looks for a special token right after it.

    Returns:
        The text, and (start, end) of each answer in it, in characters.

    Raises:
        AnswersNotFoundError: If the answers cannot be found in what the template writes.
        ConfigError: If the template ends them by no special token, or not all alike.
        DataError: If the template refuses the conversation.
    """
    text = render(tokenizer, messages, chat_template=chat_template)
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    pieces = _pieces(tokenizer, messages, contents, chat_template)
    spans = _place(text, pieces, contents) if pieces else None
    if not spans or not pieces:
        raise AnswersNotFoundError(
            "The answers cannot be found in what the chat template makes of the conversation.",
            expected="a template that writes each answer once, in full, and the same text around it whatever it says",
            got=f"{len(contents)} answers in {_short(text)}",
            fix="a template with {% generation %} marks around what is learned, or one of covft.data.CHAT_TEMPLATES",
        )
    end = find_end_of_turn(tokenizer, pieces[1:]) if end_of_turn is None else end_of_turn
    behind = [piece for piece in pieces[1:] if not piece.startswith(end)]
    if behind:
        raise ConfigError(
            f"Not every answer ends with {end!r} in this chat template.",
            got=", ".join(repr(piece[:40]) for piece in behind),
            fix="end_of_turn=...",
        )
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found, earliest = [], 0
    for number, (start, stop) in zip(answers, spans, strict=True):
        prompt = render(tokenizer, messages[:number], chat_template=chat_template, prompt=True)
        if earliest <= len(prompt) < start and text.startswith(prompt):
            # A template that knows no prompts for answers would have the model write the name of its role.
            knows = prompt != render(tokenizer, messages[:number], chat_template=chat_template)
            if knows or not text[len(prompt) : start].strip():
                start = len(prompt)
        earliest = stop + len(end)
        found.append((start, earliest))
    return text, found


def find_end_of_turn(tokenizer: Any, pieces: Sequence[str]) -> str:
    """What ends an answer: the special token after the last one, with the blanks before it.

    Args:
        tokenizer: A tokenizer of transformers.
        pieces: What the template writes after each answer.

    Raises:
        ConfigError: If no special token follows the last answer: a model would not learn to stop.
    """
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    names = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
    found = re.match(rf"\s*(?:{names})", pieces[-1]) if names else None
    if found is None:
        raise ConfigError(
            "The chat template ends an answer by no special token, so a model trained with it would never stop.",
            expected=f"one of {', '.join(sorted(special))} after the last answer",
            got=repr(pieces[-1]),
            fix='chat_template=covft.data.CHAT_TEMPLATES["vicuna_v1"], or end_of_turn="..." (or "") if you know',
        )
    return found[0]


def _pieces(
    tokenizer: Any, messages: Sequence[dict[str, str]], contents: Sequence[str], chat_template: str | None
) -> list[str] | None:
    # Letters and digits only, so that no template trims or escapes them.
    marks = [f"Qz{number}answer{number}zQ" for number in range(len(contents))]
    remaining = iter(marks)
    probe = [
        {**message, "content": next(remaining)} if message["role"] == "assistant" else message for message in messages
    ]
    text = render(tokenizer, probe, chat_template=chat_template)
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def _place(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """Spans of the contents, if the text is the pieces with the contents, blanks trimmed or not, between them."""
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
