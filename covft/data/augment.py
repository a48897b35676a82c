"""What `data_augment` of InternVL's meta file asks for: the loss of a random JPEG compression."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class JpegAugment:
    """Compress an image as JPEG of a random quality and read it again.

    Attributes:
        low: Lowest quality, 1 to 100.
        high: Highest quality, 1 to 100.
    """

    low: int = 75
    high: int = 100

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Degrade the image by a quality drawn from `rng`."""
        from PIL import Image as PILImage

        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(self.low, self.high))
        with PILImage.open(buffer) as degraded:
            return degraded.convert("RGB")
