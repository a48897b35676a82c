"""Reads images from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from covft.data.broken import DataError
from covft.data.checks import flag, short, shown, string
from covft.data.decoding import ImageDecoder
from covft.data.files import check_not_url, check_path, read_regular
from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class ImageStore(Protocol):
    """Opens images by their names in the annotations."""

    def open(self, name: str) -> Image.Image:
        """Read an image as RGB; raises DataError if it is missing or damaged."""
        ...


class ImageFolder:
    """Opens images in a folder: regular files below it, nothing else.

    Args:
        root: The folder.
        allow_absolute: Whether annotations may name files anywhere by absolute paths. Otherwise an absolute name must
            lie below the root. A name with `..` is refused in any case.
        follow_links: Whether symbolic links in the folder may lead out of it, as in data sets that are linked together
            and in the cache of the Hugging Face Hub. Choose False for a folder that a stranger's archive has filled.
        decoder: Limits and colours; None takes `ImageDecoder()`.

    Raises:
        ConfigError: If an argument is of the wrong type.
        DataError: If the folder does not exist.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        allow_absolute: bool = False,
        follow_links: bool = True,
        decoder: ImageDecoder | None = None,
    ) -> None:
        self.root = check_path(root, "The image folder")
        self.allow_absolute = flag(allow_absolute, "allow_absolute")
        self.follow_links = flag(follow_links, "follow_links")
        self.decoder = check_decoder(decoder)
        if not self.root.is_dir():
            raise DataError(f"The image folder {self.root} does not exist.", got=f"root={os.fspath(root)!r}")

    def open(self, name: str) -> Image.Image:
        """Read an image as RGB.

        Raises:
            DataError: If the name leaves the folder, or the file is missing, not a regular one, too large, truncated or
                not an image.
        """
        path = self._locate(name)
        return self.decoder(read_regular(path, "The image", self.decoder.max_bytes), str(path))

    def _locate(self, name: str) -> Path:
        check_not_url(string(name, "name"), "The image")
        given = Path(name)
        path = self.root / given
        outside = ".." in given.parts or (
            bool(given.anchor) and not self.allow_absolute and not _is_below(given, self.root, os.path.abspath)
        )
        if not outside and not self.follow_links and not (self.allow_absolute and given.anchor):
            outside = not _is_below(path, self.root, os.path.realpath)
        if outside:
            raise DataError(
                f"The image {shown(name)} lies outside the image folder {self.root}; "
                "ImageFolder(..., allow_absolute=True) reads absolute names."
            )
        return path


def image_store(images: Any) -> ImageStore:
    """Take a store, or open a folder.

    Raises:
        ConfigError: If it is neither.
        DataError: If the folder does not exist.
    """
    if isinstance(images, (str, os.PathLike)):
        return ImageFolder(images)
    if isinstance(images, type) or not isinstance(images, ImageStore):
        raise ConfigError(
            "images is neither a folder nor a store of images.",
            expected="a path, an ImageFolder, TarImages, or an object with open(name)",
            got=short(images),
        )
    return images


def _is_below(path: Path, root: Path, absolute: Callable[[Path], str]) -> bool:
    try:
        return Path(absolute(path)).is_relative_to(absolute(root))
    except ValueError:  # a NUL in the name; it cannot be opened either
        return True


def check_decoder(decoder: ImageDecoder | None) -> ImageDecoder:
    """Check a decoder, or take the default."""
    if decoder is not None and not isinstance(decoder, ImageDecoder):
        raise ConfigError(
            "decoder does not decode images.", expected="an ImageDecoder or None", got=type(decoder).__name__
        )
    return decoder or ImageDecoder()
