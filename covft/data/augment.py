"""The augmentation of `data_augment` in InternVL's meta file: JPEG compression of random quality."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from covft.data.broken import DataError
from covft.data.checks import picture, short, whole
from covft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class JpegAugment:
    """Compresses images as JPEG with a random quality.

    Attributes:
        low: Lowest quality, 1 to 100.
        high: Highest quality, 1 to 100.

    Raises:
        ConfigError: If `low` and `high` are not a range of qualities.
    """

    low: int = 75
    high: int = 100

    def __post_init__(self) -> None:
        whole(self.low, "low", least=1, most=100)
        whole(self.high, "high", least=self.low, most=100)

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Compress the image with a quality drawn from `rng`.

        Raises:
            DataError: If JPEG cannot hold it, such as more than 65,500 pixels in a row.
        """
        from PIL import Image as PILImage

        if not hasattr(rng, "randint"):
            raise ConfigError("rng draws no numbers.", expected="a random.Random", got=short(rng))
        buffer = io.BytesIO()
        try:
            picture(image).save(buffer, "JPEG", quality=rng.randint(self.low, self.high))
        except OSError as error:
            raise DataError(f"An image of {image.width} x {image.height} cannot be compressed: {error}.") from error
        with PILImage.open(buffer) as degraded:
            return degraded.convert("RGB")
