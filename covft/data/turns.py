"""Reads the turns of a conversation: texts, numbers or lists of typed parts, from LLaVA's or the chat format's keys."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from covft.data.broken import DataError
from covft.data.checks import short
from covft.errors import ConfigError

IMAGE_TAG = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_OTHER_SPELLINGS = re.compile(r"<image ?(?:here)?>", re.IGNORECASE)  # <Image>, <ImageHere> of InternLM-XComposer
_LIKE_TAGS = re.compile(r"<\|?(?:img|image)[\w -]{0,20}\|?>|\[img\]", re.IGNORECASE)
_NAME_KEYS = ("image", "path", "url", "image_url")


class Turns(NamedTuple):
    """The turns of a conversation.

    Attributes:
        messages: Chat messages whose content is text; an `<image>` stands for each image.
        named: Names of the images that the parts themselves name, None for a part that leaves it to the row.
    """

    messages: list[dict[str, str]]
    named: list[str | None]


def read_turns(turns: Any) -> Turns:
    """Read turns and check their order.

    Raises:
        DataError: If they are not a list of alternating turns of human and gpt with at least one answer.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)) or not turns:
        found = "none" if turns is None else f"an empty {type(turns).__name__}" if turns == [] else short(turns)
        raise DataError(f"The row has no list of conversation turns, but {found}.")
    read = [_read_turn(number, turn) for number, turn in enumerate(turns)]
    system = [read.pop(0)] if read[0].message["role"] == "system" else []
    if read and read[0].message["role"] == "assistant":
        read.pop(0)
    if read and read[-1].message["role"] == "user":
        read.pop()
    if not read:
        raise DataError("The conversation has no question with an answer.")
    for number, (message, _) in enumerate(read):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise DataError(f"Questions and answers do not alternate: message {number} is from the {message['role']}.")
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"The answer in message {number} is empty.")
    kept = system + read
    return Turns([turn.message for turn in kept], [name for turn in kept for name in turn.named])


def check_text(text: str, what: str) -> None:
    """Refuse text that is damaged: a tokenizer cannot read unpaired surrogates, and NUL comes from wrong encodings."""
    if "\0" in text:
        raise DataError(f"{what} contains a NUL character: {short(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} contains unpaired surrogates: {short(text)}.") from None


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Check the types of chat messages that the caller gives.

    Raises:
        ConfigError: If they are not a list of `{"role": ..., "content": ...}` with text.
    """
    if isinstance(messages, Sequence) and not isinstance(messages, (str, bytes)):
        fields = [
            (message.get("role"), message.get("content")) if isinstance(message, Mapping) else ()
            for message in messages
        ]
        if all(len(pair) == 2 and all(isinstance(value, str) for value in pair) for pair in fields):
            return list(messages)
    raise ConfigError(
        "The messages are not a conversation.",
        expected='[{"role": "user", "content": text}, ...]',
        got=short(messages),
        fix="covft.data.to_messages(row)",
    )


def count_tags(messages: Sequence[Mapping[str, str]]) -> int:
    """Count the image tags in the questions."""
    return sum(message["content"].count(IMAGE_TAG) for message in messages if message["role"] == "user")


def spell_tags(messages: Sequence[dict[str, str]], images: int) -> list[dict[str, str]]:
    """Write `<Image>` and `<ImageHere>` as `<image>`, where exactly these stand for the images of the row."""
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not images or count_tags(messages) or sum(len(_OTHER_SPELLINGS.findall(text)) for text in questions) != images:
        return list(messages)
    return [
        {**message, "content": _OTHER_SPELLINGS.sub(IMAGE_TAG, message["content"])}
        if message["role"] == "user"
        else message
        for message in messages
    ]


def like_tags(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """List what looks like an image tag in the questions but is spelled otherwise."""
    questions = " ".join(message["content"] for message in messages if message["role"] == "user")
    return sorted({tag for tag in _LIKE_TAGS.findall(questions) if tag != IMAGE_TAG})


class _Turn(NamedTuple):
    message: dict[str, str]
    named: list[str | None]


def _read_turn(number: int, turn: Any) -> _Turn:
    role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    value = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
    if isinstance(role, str) and role in _ROLES:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and _ROLES[role] == "assistant":
            value = str(value)  # an answer such as 3
        text, named = _content(number, value)
        if text is not None:
            check_text(text, f"Turn {number} of the conversation")
            return _Turn({"role": _ROLES[role], "content": text}, named)
    raise DataError(f"Turn {number} of the conversation is not {{from: human|gpt|system, value: text}}: {short(turn)}.")


def _content(number: int, value: Any) -> tuple[str | None, list[str | None]]:
    if isinstance(value, str):
        return value, []
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        return None, []
    text, named = "", []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            # LLaVA's rows put the images of a turn on lines of their own before its text.
            only_images = text and not text.replace(IMAGE_TAG, "")
            text += ("\n" if only_images and not part["text"].startswith("\n") else "") + part["text"]
        elif kind in ("image", "image_url"):
            text += IMAGE_TAG
            named.append(_name_of_part(part))
        else:
            raise DataError(
                f"Turn {number} of the conversation has a part that is neither text nor an image: {short(part)}."
            )
    return text, named


def _name_of_part(part: Mapping[str, Any]) -> str | None:
    found = next((part[key] for key in _NAME_KEYS if part.get(key) is not None), None)
    if isinstance(found, Mapping):  # {"image_url": {"url": ...}}
        found = next((found[key] for key in ("url", "path") if found.get(key) is not None), found)
    if found is not None and not isinstance(found, str):
        raise DataError(f"The image of a part is not given by name: {short(found)}.")
    return found
