"""Reads LLaVA's JSON: conversations about one image, several or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from covft.data.broken import DataError, Place
from covft.data.checks import flag, shown
from covft.data.images import ImageStore, image_store
from covft.data.records import JsonRecords
from covft.data.rows import IMAGE_TAG, Row, parse_row
from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


class LlavaRows:
    """Reads the rows of a LLaVA annotation file on access.

    Args:
        annotation: A JSON list as published, or JSONL with one row per line.
        images: The root folder of the images, or a store such as `TarImages` or an `ImageFolder` with options.
            Optional if no row has an image.
        image_first: Whether to move the tag of a single image before the question, as LLaVA does in training: half of
            the published rows have it at the end.

    Raises:
        ConfigError: If an argument is of the wrong type.
        DataError: If the file or the folder cannot be read.

    Example:
        >>> rows = LlavaRows("llava_v1_5_mix665k.json", images="playground/data")
        >>> rows[0].messages[0]["role"]
        'user'
    """

    def __init__(
        self,
        annotation: str | os.PathLike[str],
        images: str | os.PathLike[str] | ImageStore | None = None,
        *,
        image_first: bool = True,
    ) -> None:
        self.image_first = flag(image_first, "image_first")
        self.images = None if images is None else image_store(images)
        self.records = JsonRecords(annotation)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Row:
        record = self.records[index]
        try:
            row = parse_row(record)
        except DataError as error:
            raise error.at(self.place(index)) from error.__cause__
        return replace(row, messages=tuple(map(image_first, row.messages))) if self.image_first else row

    def place(self, index: int) -> Place:
        """Locate a row by file, index and line."""
        return self.records.place(index)

    def image(self, index: int, name: str) -> Image.Image:
        """Read an image of a row as RGB.

        Raises:
            DataError: If it is missing or damaged.
            ConfigError: If there is no folder of images.
        """
        if self.images is None:
            raise ConfigError(
                f"{self.place(index)} has the image {shown(name)}, but no folder of images was given.",
                fix='LlavaRows(annotation, images="folder")',
            )
        return self.images.open(name)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Iterate over indices and raw records; lines that are not JSON are skipped."""
        return self.records.scan()


def image_first(message: dict[str, str]) -> dict[str, str]:
    """Move the tag of a single image before the user's text; other messages stay as they are."""
    text = message["content"]
    if message["role"] != "user" or text.count(IMAGE_TAG) != 1:
        return message
    return {"role": "user", "content": f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}"}
