"""Fits images to the input of a vision tower: padded to a square, or cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from covft.data.broken import DataError
from covft.data.checks import color as check_color
from covft.data.checks import flag, picture, short, whole
from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

MOST_TILES = 1000


_LARGEST_TILE = 4096  # pixels; towers take up to some 1000


def tile_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448
) -> tuple[int, int]:
    """Find the grid with the aspect ratio closest to the image's (InternVL's dynamic tiling).

    Among equally close grids, such as 1 x 1, 2 x 2 and 3 x 3 for a square, it is the largest of which the image fills
    more than half, else the smallest.

    Args:
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        min_tiles: Minimum of tiles.
        max_tiles: Maximum of tiles, without the thumbnail.
        tile_size: Side of a tile, in pixels.

    Returns:
        Columns and rows.

    Raises:
        ConfigError: If not 1 <= min_tiles <= max_tiles <= 1000, or a size cannot be used.

    Example:
        >>> tile_grid(1920, 1080)
        (4, 2)
    """
    for name, value in (("width", width), ("height", height)):
        whole(value, name, least=1)
    whole(tile_size, "tile_size", least=1, most=_LARGEST_TILE)
    _check_tiles(min_tiles, max_tiles)
    ratio = width / height
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    nearest = min(abs(ratio - columns / rows) for columns, rows in grids)
    equal = sorted((c * r, c, r) for c, r in grids if abs(ratio - c / r) == nearest)
    filled = [grid for grid in equal if width * height > 0.5 * tile_size**2 * grid[0]]
    _, columns, rows = filled[-1] if filled else equal[0]
    return columns, rows


def tile_image(
    image: Image.Image, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448, thumbnail: bool = True
) -> list[Image.Image]:
    """Resize an image to its grid and cut it into square tiles, row by row.

    Args:
        image: The image.
        min_tiles: Minimum of tiles.
        max_tiles: Maximum of tiles, without the thumbnail.
        tile_size: Side of a tile, in pixels.
        thumbnail: Whether to append the resized image as a last tile, if there are several.

    Returns:
        Images of `tile_size` x `tile_size`.
    """
    flag(thumbnail, "thumbnail")
    columns, rows = tile_grid(*picture(image).size, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size)
    resized = image.resize((columns * tile_size, rows * tile_size))
    tiles = []
    for row in range(rows):
        for column in range(columns):
            left, top = column * tile_size, row * tile_size
            tiles.append(resized.crop((left, top, left + tile_size, top + tile_size)))
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size)))
    return tiles


def pad_to_square(image: Image.Image, color: tuple[int, int, int] = (0, 0, 0), *, max_side: int = 8192) -> Image.Image:
    """Centre an image on a square of one colour (LLaVA-1.5's `image_aspect_ratio pad`).

    Args:
        image: The image.
        color: RGB of the border, 0 to 255; LLaVA takes the mean of its image processor.
        max_side: Longest side of the square, in pixels. A longer image is reduced to it first, so that a strip one
            pixel high does not become a square of its length.
    """
    from PIL import Image as PILImage

    color = check_color(color, "color")
    side = max(picture(image).size)
    whole(max_side, "max_side", least=1)
    if side > max_side:
        image = image.resize(tuple(max(1, round(length * max_side / side)) for length in image.size))  # type: ignore
        side = max_side
    if image.size == (side, side):
        return image
    square = PILImage.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Tiling(Protocol):
    """Splits an image into those that the vision tower sees."""

    def __call__(self, image: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Split the image into at most `max_tiles`, if given, instead of the tiling's own limit."""
        ...


@dataclass(frozen=True)
class DynamicTiling:
    """InternVL's dynamic tiling; the fields are the keywords of `tile_image`."""

    min_tiles: int = 1
    max_tiles: int = 12
    tile_size: int = 448
    thumbnail: bool = True

    def __post_init__(self) -> None:
        _check_tiles(self.min_tiles, self.max_tiles)
        whole(self.tile_size, "tile_size", least=1, most=_LARGEST_TILE)
        flag(self.thumbnail, "thumbnail")

    def __call__(self, image: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Cut the image into at most `max_tiles`, if given."""
        most = self.max_tiles if max_tiles is None else whole(max_tiles, "max_tiles", least=1)
        return tile_image(
            image,
            min_tiles=min(self.min_tiles, most),
            max_tiles=most,
            tile_size=self.tile_size,
            thumbnail=self.thumbnail,
        )


@dataclass(frozen=True)
class PadToSquare:
    """LLaVA-1.5's padding to a square.

    Attributes:
        color: RGB of the border, 0 to 255.
        max_side: Longest side of the square; see `pad_to_square`.
    """

    color: tuple[int, int, int] = (122, 116, 104)  # CLIP's mean (0.481, 0.458, 0.408) in 255ths, rounded down
    max_side: int = 8192

    def __post_init__(self) -> None:
        check_color(self.color, "color")
        whole(self.max_side, "max_side", least=1)

    def __call__(self, image: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Pad the image."""
        return [pad_to_square(image, self.color, max_side=self.max_side)]


@dataclass(frozen=True)
class NoTiling:
    """Passes images to the image processor unchanged.

    Attributes:
        max_aspect_ratio: Longest side over shortest side; an image beyond makes a broken row. A processor that resizes
            the shortest side to 336 would make 90 million pixels of a strip of 800 x 1. 200 is the limit of Qwen2-VL.
    """

    max_aspect_ratio: float = 200

    def __post_init__(self) -> None:
        ratio = self.max_aspect_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
            raise ConfigError(f"max_aspect_ratio={short(ratio)} cannot be used.", expected="a number >= 1")

    def __call__(self, image: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Return the image.

        Raises:
            DataError: If it is too long for its width.
        """
        width, height = picture(image).size
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise DataError(
                f"An image of {width} x {height} pixels is more than {self.max_aspect_ratio} times as long as it is "
                "wide; NoTiling(max_aspect_ratio=...), PadToSquare() or DynamicTiling() takes it."
            )
        return [image]


def _check_tiles(min_tiles: Any, max_tiles: Any) -> None:
    for name, value in (("min_tiles", min_tiles), ("max_tiles", max_tiles)):
        whole(value, name)
    if not 1 <= min_tiles <= max_tiles <= MOST_TILES:
        raise ConfigError(
            f"min_tiles={min_tiles}, max_tiles={max_tiles} allow no grid.",
            expected=f"1 <= min_tiles <= max_tiles <= {MOST_TILES}",
        )
