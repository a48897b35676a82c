"""One row of training data, whatever file it came from."""

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
        messages: `{"role": ..., "content": ...}` of a system turn (where there is one), then of user and assistant in
            turns; an `<image>` in the user's text for each image, in the order of `images`.
        images: Names of the images, as the annotation gives them.
        id: What the annotation calls the row; empty if it does not.
        dataset: Name of the data set within a mixture; empty outside one.
        max_tiles: Most tiles of one image, where the mixture sets it.
        augment: Whether the mixture asks for augmented images.
    """

    messages: tuple[dict[str, str], ...]
    images: tuple[str, ...] = ()
    id: str = ""
    dataset: str = ""
    max_tiles: int | None = None
    augment: bool = False


class RowSource(Protocol):
    """What a data set reads its rows from."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Row:
        """A row; raises DataError if it cannot be used."""
        ...

    def place(self, index: int) -> Place:
        """Where the row stands."""
        ...

    def image(self, index: int, name: str) -> Image.Image:
        """An image of the row as RGB; raises DataError if it cannot be read."""
        ...


def parse_row(record: Any, *, add_missing_tag: bool = False) -> Row:
    """Check a record in LLaVA's format and bring it into one shape.

    An answer before the first question and a question after the last answer are dropped: nothing asks for the first
    and nothing can be learned from the second.

    Args:
        record: `{"id": ..., "image": name or list of names, "conversations": [{"from": "human", "value": ...}, ...]}`;
            a row about no image has no `image`.
        add_missing_tag: Whether the one image of a row without any `<image>` is put before its first question.

    Raises:
        DataError: If something is missing, of a wrong type, out of order, or if images and `<image>` tags do not match.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"The row is no JSON object but {type(record).__name__}.")
    if record.get("video"):
        raise DataError("The row is about a video; only images are read.")
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
        raise DataError(f"There is an {IMAGE_TAG} tag outside the questions.")
    return Row(messages=tuple(messages), images=images, id=str(record.get("id", "")))


def parse_turns(turns: Any) -> list[dict[str, str]]:
    """The turns of a conversation as chat messages; see `parse_row`.

    Raises:
        DataError: If they are not a list of turns of human and gpt in alternation with at least one answer.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DataError("The row has no list of conversations.")
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
            raise DataError(f"Questions and answers do not alternate: message {number} is by the {message['role']}.")
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
