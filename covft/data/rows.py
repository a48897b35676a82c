"""Parses a row of training data into one form for all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from covft.data.broken import DataError, Place

if TYPE_CHECKING:
    from PIL import Image

IMAGE_TAG = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Row:
    """A conversation about some images, or about none.

    Attributes:
        messages: `{"role": ..., "content": ...}`: an optional system turn, then user and assistant in turns. The user's
            text has one `<image>` per image, in the order of `images`.
        images: Names of the images in the annotation.
        id: Id of the row in the annotation; empty if it has none.
        dataset: Name of the data set within a mixture; empty outside one.
        max_tiles: Maximum of tiles per image, if the mixture sets it.
        augment: Whether the mixture asks for augmentation.
    """

    messages: tuple[dict[str, str], ...]
    images: tuple[str, ...] = ()
    id: str = ""
    dataset: str = ""
    max_tiles: int | None = None
    augment: bool = False


class RowSource(Protocol):
    """Provides the rows of a data set."""

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def __getitem__(self, index: int) -> Row:
        """Read a row; raises DataError if it is unusable."""
        ...

    def place(self, index: int) -> Place:
        """Locate a row."""
        ...

    def image(self, index: int, name: str) -> Image.Image:
        """Read an image of a row as RGB; raises DataError if it is unreadable."""
        ...


def parse_row(record: Any, *, add_missing_tag: bool = False) -> Row:
    """Check and parse a record in LLaVA's format.

    An answer before the first question and a question after the last answer are dropped.

    Args:
        record: `{"id": ..., "image": name or list of names, "conversations": [{"from": "human", "value": ...}, ...]}`;
            a row without images has no `image`.
        add_missing_tag: Whether to add a missing `<image>` before the first question of a row with one image.

    Raises:
        DataError: If a field is missing, malformed or out of order, or images and `<image>` tags do not match.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"The row is not a JSON object but {type(record).__name__}.")
    if record.get("video"):
        raise DataError("The row has a video; only images are supported.")
    messages = parse_turns(record.get("conversations"))
    images = _image_names(record)
    tags = sum(message["content"].count(IMAGE_TAG) for message in messages if message["role"] == "user")
    if add_missing_tag and len(images) == 1 and tags == 0:
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[first] = {"role": "user", "content": f"{IMAGE_TAG}\n{messages[first]['content']}"}
        tags = 1
    if tags != len(images):
        few = "few" if tags < len(images) else "many"
        raise DataError(f"Too {few} {IMAGE_TAG} tags in the questions: {tags} for {len(images)} images.")
    if any(IMAGE_TAG in message["content"] for message in messages if message["role"] != "user"):
        raise DataError(f"An {IMAGE_TAG} tag stands outside the questions.")
    return Row(messages=tuple(messages), images=images, id=str(record.get("id", "")))


def parse_turns(turns: Any) -> list[dict[str, str]]:
    """Convert the turns of a conversation to chat messages; see `parse_row`.

    Raises:
        DataError: If they are not a list of alternating turns of human and gpt with at least one answer.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DataError("The row has no list of conversation turns.")
    messages = []
    for number, turn in enumerate(turns):
        role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        value = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or role not in _ROLES or not isinstance(value, str):
            raise DataError(
                f"Turn {number} of the conversation is not {{from: human|gpt|system, value: text}}: {turn!r}."
            )
        messages.append({"role": _ROLES[role], "content": value})
    system = [messages.pop(0)] if messages[0]["role"] == "system" else []
    if messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages:
        raise DataError("The conversation has no question with an answer.")
    for number, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise DataError(f"Questions and answers do not alternate: message {number} is from the {message['role']}.")
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"The answer in message {number} is empty.")
    return system + messages


def _image_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    images = record.get("image", record.get("images"))
    if images is None or images == "":
        return ()
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"The image is neither a name nor a list of names: {images!r}.")
    return tuple(names)
