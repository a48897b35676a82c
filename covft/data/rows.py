"""Parses a row of training data into one form for all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from covft.data.broken import DataError, Place
from covft.data.checks import flag, short
from covft.data.turns import IMAGE_TAG, check_text, count_tags, like_tags, read_turns, spell_tags

if TYPE_CHECKING:
    from PIL import Image


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


@runtime_checkable
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
    """Check and parse a record in LLaVA's format, or in the form of chat messages.

    An answer before the first question and a question after the last answer are dropped. Answers that are
    numbers are read as text. `<Image>` and `<ImageHere>` are read as `<image>` where these alone stand for the images.

    Args:
        record: `{"id": ..., "image": name or list of names, "conversations": [{"from": "human", "value": ...}, ...]}`;
            a row without images has no `image`. Or `{"images": [...], "messages": [{"role": "user", "content": ...},
            ...]}`, whose content is text or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image"}`.
        add_missing_tag: Whether to add a missing `<image>` before the first question of a row with one image.

    Raises:
        DataError: If a field is missing, malformed or out of order, or images and `<image>` tags do not match.
    """
    flag(add_missing_tag, "add_missing_tag")
    if not isinstance(record, Mapping):
        raise DataError(f"The row is not a JSON object but {type(record).__name__}.")
    for kind in ("video", "videos", "audio", "audios"):
        if record.get(kind):
            raise DataError(f"The row has a field {kind!r}; only images are supported.")
    messages, named = read_turns(_first(record, "conversations", "messages"))
    images = _images(record, named)
    messages = spell_tags(messages, len(images))
    tags = count_tags(messages)
    others = like_tags(messages) if tags != len(images) else []
    if add_missing_tag and len(images) == 1 and tags == 0 and not others:
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[first] = {"role": "user", "content": f"{IMAGE_TAG}\n{messages[first]['content']}"}
        tags = 1
    if tags != len(images):
        few = "few" if tags < len(images) else "many"
        found = f" The questions contain {', '.join(others)}." if others else ""
        raise DataError(f"Too {few} {IMAGE_TAG} tags in the questions: {tags} for {len(images)} images.{found}")
    if any(IMAGE_TAG in message["content"] for message in messages if message["role"] != "user"):
        raise DataError(f"An {IMAGE_TAG} tag stands outside the questions.")
    return Row(messages=tuple(messages), images=images, id=str(record.get("id", "")))


def parse_turns(turns: Any) -> list[dict[str, str]]:
    """Convert the turns of a conversation to chat messages; see `parse_row`.

    Raises:
        DataError: If they are not a list of alternating turns of human and gpt with at least one answer.
    """
    return read_turns(turns).messages


def _images(record: Mapping[str, Any], named: Sequence[str | None]) -> tuple[str, ...]:
    """Names of the images, by the row or by the parts of its turns."""
    one, several = names_of(record.get("image")), names_of(record.get("images"))
    if one and several and one != several:
        raise DataError(f"The row names images twice: image {short(one)}, images {short(several)}.")
    given = one or several
    by_parts = [name for name in named if name is not None]
    if not by_parts:
        return given
    if len(by_parts) != len(named) or (given and list(given) != by_parts):
        raise DataError(f"The row and the parts of its turns name other images: {short(given)}, {short(by_parts)}.")
    return names_of(by_parts)


def names_of(images: Any) -> tuple[str, ...]:
    """Return the names of a row's images, given as a name, a list of names, or nothing.

    Raises:
        DataError: If they are of another kind.
    """
    if images is None or images == "":
        return ()
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, Sequence) or isinstance(names, bytes):
        raise DataError(f"The image is neither a name nor a list of names: {short(images)}.")
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(f"The image is neither a name nor a list of names: {short(images)}.")
        check_text(name, "The name of an image")
    return tuple(names)


def _first(record: Mapping[str, Any], *keys: str) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)
