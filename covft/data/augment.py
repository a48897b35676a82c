"""The augmentation of `data_augment` in InternVL's meta file: JPEG compression of random quality."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class JpegAugment:
    """Compresses images as JPEG with a random quality.

    Attributes:
        low: Lowest quality, 1 to 100.
        high: Highest quality, 1 to 100.
    """

    low: int = 75
    high: int = 100

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Compress the image with a quality drawn from `rng`."""
        from PIL import Image as PILImage

        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(self.low, self.high))
        with PILImage.open(buffer) as degraded:
            return degraded.convert("RGB")
