"""Decodes image files to RGB, within limits."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from covft.data.broken import DataError
from covft.data.checks import color, shown, whole
from covft.data.files import check_size
from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

# Not among them: EPS, which PIL gives to Ghostscript, and formats of other fields.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_BITS_PER_SAMPLE = 258  # a tag of TIFF


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes image files to RGB.

    Pictures are turned as their EXIF orientation says. Transparent ones are put on a ground of one colour. 16-bit grey
    is divided by 256; 32-bit grey, integer or float, has no range that is known and is refused. The first frame of an
    animation is read.

    A picture takes at most `max_bytes` and 28 bytes per pixel while it is decoded (transparent JPEG 2000; 8 for JPEG):
    2.5 GiB with the default limits. What remains takes 4 bytes per pixel.

    Attributes:
        max_bytes: Largest file, in bytes.
        max_pixels: Largest picture, in pixels. The default is the size at which PIL warns of decompression bombs; above
            twice that, PIL itself refuses unless `PIL.Image.MAX_IMAGE_PIXELS` is raised too.
        background: RGB of the ground below transparent pictures, 0 to 255; white shows black writing. None drops the
            transparency and shows the hidden colours.

    Raises:
        ConfigError: If a setting is invalid.

    Example:
        >>> LlavaRows("train.json", ImageFolder("images", decoder=ImageDecoder(max_pixels=20_000_000)))
    """

    max_bytes: int = 128 << 20
    max_pixels: int = 89_478_485
    background: tuple[int, int, int] | None = (255, 255, 255)

    def __post_init__(self) -> None:
        whole(self.max_bytes, "max_bytes", least=1)
        whole(self.max_pixels, "max_pixels", least=1)
        if self.background is not None:
            color(self.background, "background")

    def __call__(self, data: bytes, name: str) -> Image.Image:
        """Decode an image.

        Args:
            data: The content of the file.
            name: Name of the image in errors.

        Raises:
            DataError: If it is too large, damaged, truncated, or not an image of a known format.
        """
        from PIL import Image as PILImage

        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ConfigError("An image is decoded from bytes.", expected="bytes", got=type(data).__name__)
        name = shown(str(name))
        check_size(len(data), f"The image {name}", self.max_bytes)
        try:
            with PILImage.open(io.BytesIO(data), formats=_formats()) as image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise DataError(f"The image {name} has {width} x {height} pixels, {self._limit()}.")
                image.load()
                _turn(image)
                return self._to_rgb(image, name)
        except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
            raise DataError(f"The image {name} has too many pixels, {self._limit()}.") from error
        except DataError:
            raise
        except Exception as error:  # decoders raise all kinds of errors for damaged files
            raise DataError(f"The image {name} cannot be decoded: {type(error).__name__}: {error}.") from error

    def _limit(self) -> str:
        return f"more than max_pixels={self.max_pixels:,}"

    def _to_rgb(self, image: Any, name: str) -> Image.Image:
        from PIL import Image as PILImage

        image = _eight_bits(image, name)
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        if self.background is None:
            return image.convert("RGB")
        ground = PILImage.new("RGB", image.size, tuple(self.background))
        ground.paste(image, mask=image)
        return ground


@functools.cache
def _formats() -> tuple[str, ...]:
    """List the formats that this build of PIL reads."""
    from PIL import Image as PILImage

    PILImage.init()
    return tuple(name for name in _FORMATS if name in PILImage.OPEN)


def _turn(image: Any) -> None:
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data; the pixels are sound
        pass


def _eight_bits(image: Any, name: str) -> Any:
    """Convert grey of 16 bits, which PIL cuts off at 255."""
    from PIL import Image as PILImage

    # PIL reads 16-bit files of these formats as 32 bits, depending on its version.
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not wide:
        if image.mode in ("I", "F"):
            raise DataError(
                f"The image {name} is grey of 32 bits, whose black and white are not known. Convert it to 8 or 16 bits."
            )
        return image
    values = np.asarray(image)
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    grey = PILImage.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))
    hidden = image.info.get("transparency")
    if not isinstance(hidden, int):
        return grey
    return PILImage.merge("LA", [grey, PILImage.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))])
