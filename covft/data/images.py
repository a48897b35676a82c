"""Reads images from a folder or from tar shards."""

from __future__ import annotations

import glob
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from covft.data.broken import DataError

if TYPE_CHECKING:
    from PIL import Image


class ImageStore(Protocol):
    """Opens images by their names in the annotations."""

    def open(self, name: str) -> Image.Image:
        """Read an image as RGB; raises DataError if it is missing or damaged."""
        ...


class ImageFolder:
    """Opens images in a folder.

    Args:
        root: The folder; absolute names in annotations ignore it.

    Raises:
        DataError: If the folder does not exist.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"The image folder {self.root} does not exist.", got=f"root={os.fspath(root)!r}")

    def open(self, name: str) -> Image.Image:
        """Read an image as RGB.

        Raises:
            DataError: If it is missing, truncated or not an image.
        """
        path = self.root / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"The image {path} cannot be read: {error.strerror or error}.") from error
        return decode_image(data, str(path))


class TarImages:
    """Opens images in uncompressed tar shards.

    The headers are read once; an image then takes one seek and one read. No file stays open.

    Args:
        shards: A shard, a pattern such as `"shards/*.tar"` or `"shards/{000..099}.tar"`, or several of these. Names
            inside the shards match those in the annotations (a leading `./` is ignored).

    Raises:
        DataError: If no shard is found, one is damaged or compressed, or two contain an image of the same name.
    """

    def __init__(self, shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
        given = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
        self.shards: list[str] = []
        for path in given:
            for pattern in _ranges(os.fspath(path)):
                # Not Path.glob: patterns may be absolute and have wildcards in their folders.
                found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))  # noqa: PTH207
                if not found:
                    raise DataError(f"No tar shard matches {pattern!r}.")
                self.shards += found
        self._members: dict[str, tuple[int, int, int]] = {}
        for number, shard in enumerate(self.shards):
            self._index(number, shard)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and posixpath.normpath(name) in self._members

    def open(self, name: str) -> Image.Image:
        """Read an image as RGB.

        Raises:
            DataError: If it is in no shard, truncated or not an image.
        """
        try:
            number, offset, size = self._members[posixpath.normpath(name)]
        except KeyError:
            raise DataError(f"None of the {len(self.shards)} tar shards contains the image {name}.") from None
        try:
            with Path(self.shards[number]).open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"The shard {self.shards[number]} cannot be read: {error.strerror or error}.") from error
        return decode_image(data, f"{self.shards[number]}:{name}")

    def _index(self, number: int, shard: str) -> None:
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    name = posixpath.normpath(member.name)
                    if name in self._members:
                        raise DataError(
                            f"Two images in the tar shards are named {name}.",
                            got=f"{self.shards[self._members[name][0]]} and {shard}",
                        )
                    self._members[name] = (number, member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise DataError(
                f"{shard} cannot be read as a tar shard: {error}.",
                expected="an uncompressed .tar, which allows random access",
                fix="decompress it; images do not compress further",
            ) from error


def _ranges(pattern: str) -> list[str]:
    """Expand ranges such as `{000..099}`, webdataset's notation for shards."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    names = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [path for name in names for path in _ranges(pattern[: found.start()] + name + pattern[found.end() :])]


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to RGB; transparency is dropped.

    Args:
        data: The content of the file.
        name: Name of the image in errors.

    Raises:
        DataError: If it is damaged, truncated or not an image.
    """
    from PIL import Image as PILImage

    try:
        with PILImage.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode == "P" and "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            if image.mode.startswith("I;16"):  # PIL would clip it at 255
                return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise DataError(f"The image {name} cannot be decoded: {type(error).__name__}: {error}.") from error
