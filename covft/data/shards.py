"""Reads images from tar shards."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from covft.data.broken import DataError
from covft.data.checks import shown, string
from covft.data.files import check_path, check_size, open_regular
from covft.data.images import check_decoder

if TYPE_CHECKING:
    from PIL import Image

    from covft.data.decoding import ImageDecoder

_LONGEST_HEADER = 16 << 20  # bytes
_LONGEST_RANGE = 6  # digits


class TarImages:
    """Opens images in uncompressed tar shards.

    The headers are read once; an image then takes one seek and one read. No file stays open.

    Args:
        shards: A shard, a pattern such as `"shards/*.tar"` or `"shards/{000..099}.tar"`, or several of these. Names
            inside the shards match those in the annotations (a leading `./` is ignored).
        decoder: Limits and colours; None takes `ImageDecoder()`.

    Raises:
        ConfigError: If an argument is of the wrong type.
        DataError: If no shard is found, one is damaged or compressed, or two contain an image of the same name.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        decoder: ImageDecoder | None = None,
    ) -> None:
        self.decoder = check_decoder(decoder)
        given = shards if isinstance(shards, Iterable) and not isinstance(shards, str) else [shards]
        self.shards: list[str] = []
        for path in given:
            for pattern in _ranges(os.fspath(check_path(path, "A tar shard"))):
                # Not Path.glob: patterns may be absolute and have wildcards in their folders.
                found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))  # noqa: PTH207
                if not found:
                    raise DataError(f"No tar shard matches {pattern!r}.")
                self.shards += found
        if not self.shards:
            raise DataError("No tar shard was given.")
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
        found = self._members.get(posixpath.normpath(string(name, "name")))
        if found is None:
            raise DataError(f"None of the {len(self.shards)} tar shards contains the image {shown(name)}.")
        number, offset, size = found
        where = f"{self.shards[number]}:{name}"
        check_size(size, f"The image {shown(where)}", self.decoder.max_bytes)
        try:
            with open_regular(Path(self.shards[number]), "The shard") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"The shard {self.shards[number]} cannot be read: {error.strerror or error}.") from error
        return self.decoder(data, where)

    def _index(self, number: int, shard: str) -> None:
        try:
            with open_regular(Path(shard), "The shard") as file:
                for member in tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:"):
                    if not member.isfile() or member.issparse():
                        continue
                    name = posixpath.normpath(member.name)
                    if name in self._members:
                        raise DataError(
                            f"Two images in the tar shards are named {shown(name)}.",
                            got=f"{self.shards[self._members[name][0]]} and {shard}",
                        )
                    self._members[name] = (number, member.offset_data, member.size)
        except DataError:
            raise
        except (OSError, tarfile.TarError, ValueError, ArithmeticError) as error:
            raise DataError(
                f"{shard} cannot be read as a tar shard: {error}.",
                expected="an uncompressed .tar, which allows random access",
                fix="decompress it; images do not compress further",
            ) from error


class _Headers:
    """A file whose headers are read: a header that claims to be huge must not fill the memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def _ranges(pattern: str) -> list[str]:
    """Expand ranges such as `{000..099}`, webdataset's notation for shards."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if max(len(first), len(last)) > _LONGEST_RANGE or int(last) < int(first):
        raise DataError(f"The range of shards in {shown(pattern)} is empty or too long.")
    names = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [path for name in names for path in _ranges(pattern[: found.start()] + name + pattern[found.end() :])]
