"""Reads rows from the `datasets` library: hub data sets, Parquet files, webdataset shards."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from covft.data.broken import DataError, Place
from covft.data.checks import flag, shown, whole
from covft.data.decoding import ImageDecoder
from covft.data.images import ImageStore, check_decoder, image_store
from covft.data.llava import image_first as put_image_first
from covft.data.rows import Row, parse_row
from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


class DatasetsRows:
    """Reads the rows of a `datasets.Dataset` with conversations in LLaVA's format.

    covft decodes the images on access, so that a damaged one makes a broken row. A data set may name images instead of
    holding them; these are read only in `folder`, because a downloaded file could name any file of this machine.

    Args:
        dataset: A data set with random access (not a stream).
        conversations: Column of the turns (`from`/`value` or `role`/`content`), or of records with a `conversations`
            field, such as webdataset's `json`.
        images: Column of images or of lists of images, empty for rows without; None if no row has any.
        image_first: As in `LlavaRows`.
        folder: Root folder of images that the data set names, or a store such as `ImageFolder(...)` with options.
        decoder: Limits and colours of images that the data set holds; None takes `ImageDecoder()`.

    Raises:
        ConfigError: If an argument is of the wrong type, a column is missing, or `images` does not hold the `Image`
            feature.

    Example:
        >>> rows = DatasetsRows(datasets.load_dataset("parquet", data_files="train.parquet", split="train"))
    """

    def __init__(
        self,
        dataset: Any,
        *,
        conversations: str = "conversations",
        images: str | None = "image",
        image_first: bool = True,
        folder: str | os.PathLike[str] | ImageStore | None = None,
        decoder: ImageDecoder | None = None,
    ) -> None:
        if not all(hasattr(dataset, name) for name in ("column_names", "select_columns", "info", "features")) or (
            isinstance(dataset.column_names, dict)
        ):
            raise ConfigError(
                "The data set is not one with random access.",
                expected="a datasets.Dataset, one split",
                got=type(dataset).__name__,
                fix='datasets.load_dataset(..., split="train")',
            )
        self.image_first = flag(image_first, "image_first")
        self.decoder = check_decoder(decoder)
        self.folder = None if folder is None else image_store(folder)
        missing = [name for name in (conversations, images) if name is not None and name not in dataset.column_names]
        if missing:
            raise ConfigError(
                f"The data set has no column {' and no column '.join(map(repr, missing))}.",
                known=", ".join(dataset.column_names),
                fix="DatasetsRows(dataset, conversations=..., images=...)",
            )
        self.name = str(getattr(dataset.info, "dataset_name", None) or "datasets.Dataset")
        self.conversations = conversations
        self._texts = dataset.select_columns([conversations])
        self._images = None if images is None else _undecoded(dataset.select_columns([images]), images)
        self._column = images

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Row:
        turns = self._texts[index][self.conversations]
        if isinstance(turns, dict):
            turns = turns.get("conversations")
        names = [str(number) for number in range(len(self._files(index)))]
        try:
            row = parse_row({"conversations": turns, "image": names, "id": index})
        except DataError as error:
            raise error.at(self.place(index)) from error.__cause__
        return replace(row, messages=tuple(map(put_image_first, row.messages))) if self.image_first else row

    def place(self, index: int) -> Place:
        """Locate a row: the name of the data set and the index."""
        return Place(self.name, index)

    def image(self, index: int, name: str) -> Image.Image:
        """Read an image of a row, named by its index, as RGB.

        Raises:
            DataError: If it is missing or damaged.
        """
        files = self._files(index)
        file = files[whole(int(name) if str(name).isdecimal() else name, "name", least=0, most=len(files) - 1)]
        data, path = file.get("bytes"), file.get("path")
        if data is not None:
            return self.decoder(data, str(path or f"{name} of the row"))
        if not isinstance(path, str) or not path:
            raise DataError(f"The image {name} of the row has neither content nor a name.")
        if self.folder is None:
            raise DataError(
                f"The data set names the image {shown(path)} instead of holding it; "
                'DatasetsRows(..., folder="images") reads images that are named.'
            )
        return self.folder.open(path)

    def _files(self, index: int) -> list[dict[str, Any]]:
        if self._images is None:
            return []
        found = self._images[index][self._column]
        return [file for file in (found if isinstance(found, list) else [found]) if file is not None]


def _undecoded(dataset: Any, column: str) -> Any:
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return dataset.cast_column(column, type(feature)(datasets.Image(decode=False)))
    raise ConfigError(
        f"The column {column!r} does not hold images.",
        expected="datasets.Image() or a list of them",
        got=feature,
        fix=f"dataset.cast_column({column!r}, datasets.Image())",
    )
