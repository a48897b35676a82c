"""Fits images to the input of a vision tower: padded to a square, or cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


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
        ConfigError: If not 1 <= min_tiles <= max_tiles.

    Example:
        >>> tile_grid(1920, 1080)
        (4, 2)
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ConfigError(
            f"min_tiles={min_tiles}, max_tiles={max_tiles} allow no grid.", expected="1 <= min_tiles <= max_tiles"
        )
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
    columns, rows = tile_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size)
    resized = image.resize((columns * tile_size, rows * tile_size))
    tiles = []
    for row in range(rows):
        for column in range(columns):
            left, top = column * tile_size, row * tile_size
            tiles.append(resized.crop((left, top, left + tile_size, top + tile_size)))
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size)))
    return tiles


def pad_to_square(image: Image.Image, color: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Centre an image on a square of one colour (LLaVA-1.5's `image_aspect_ratio pad`).

    Args:
        image: The image.
        color: RGB of the border, 0 to 255; LLaVA takes the mean of its image processor.
    """
    from PIL import Image as PILImage

    side = max(image.size)
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

    def __call__(self, image: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Cut the image into at most `max_tiles`, if given."""
        most = self.max_tiles if max_tiles is None else max_tiles
        return tile_image(
            image,
            min_tiles=min(self.min_tiles, most),
            max_tiles=most,
            tile_size=self.tile_size,
            thumbnail=self.thumbnail,
        )


@dataclass(frozen=True)
class PadToSquare:
    """LLaVA-1.5's padding to a square."""

    color: tuple[int, int, int] = (122, 116, 104)  # CLIP's mean (0.481, 0.458, 0.408) in 255ths, rounded down

    def __call__(self, image: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Pad the image."""
        return [pad_to_square(image, self.color)]


@dataclass(frozen=True)
class NoTiling:
    """Passes images to the image processor unchanged."""

    def __call__(self, image: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Return the image."""
        return [image]
