"""Real pixels, cut into small tiles that each show one thing.

The splits share no underlying samples: each has its own handwritten digits, faces and easy-VQA images, and its own
band of columns of each texture photograph. Three photographs show a single thing (cat, coffee, rocket); there the
splits share the thing and differ in the window that is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from study.data.packages import easy_vqa_folder, photograph
from study.data.prepared import prepared

SPLITS = ("train", "validation", "test")
TILE = 18  # pixels; a cell of 20 with a margin of one
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 210, 40),
    "teal": (30, 150, 160),
    "brown": (140, 80, 40),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("sun", "key", "map", "box", "hat", "bus", "pen", "dog", "owl", "ink", "toy", "jam")
TEXTURES = {
    "coins": "coins.png",
    "bricks": "brick.png",
    "grass": "grass.png",
    "stars": "hubble_deep_field.jpg",
}
THINGS = {  # file, and the box (left, top, right, bottom) around the thing
    "cat": ("chelsea.png", (60, 10, 320, 270)),
    "coffee": ("coffee.png", (120, 40, 480, 390)),
    "rocket": ("rocket.jpg", (245, 60, 405, 260)),
}
PHOTOS = (*THINGS, *TEXTURES, "face")


@dataclass(frozen=True)
class Tile:
    """A small image of one thing.

    Attributes:
        kind: `shape`, `digit`, `word` or `photo`.
        name: Name of the thing: `circle`, `seven`, `sun`, `cat`.
        colour: Colour of a shape, otherwise None.
        source: The underlying sample; no source is in two splits.
        pixels: uint8, shape `(18, 18, 3)`.
    """

    kind: str
    name: str
    colour: str | None
    source: str
    pixels: np.ndarray


def tiles(split: str) -> dict[str, tuple[Tile, ...]]:
    """Return every tile of a split by kind: from the prepared file, or else from the packages.

    Raises:
        MissingDependencyError: If there is no prepared file, and scikit-image or easy-vqa is not installed.
    """
    found = prepared()
    return build_tiles(split) if found is None else found.tiles[split]


@lru_cache(maxsize=3)
def build_tiles(split: str) -> dict[str, tuple[Tile, ...]]:
    """Cut and draw every tile of a split, the same on every machine.

    Raises:
        MissingDependencyError: If scikit-image or easy-vqa is not installed.
    """
    which = SPLITS.index(split)
    rng = np.random.default_rng([11, which])
    return {
        "shape": (*_easy_vqa(which, rng), *_drawn_shapes(split, rng)),
        "digit": tuple(_digits(which)),
        "word": tuple(_words(split, rng)),
        "photo": (*_photographs(which, rng), *_faces(which)),
    }


def _share(count: int, which: int) -> range:
    """Return the indices of split `which` when `count` samples are divided 70 : 15 : 15."""
    edges = (0, int(0.7 * count), int(0.85 * count), count)
    return range(edges[which], edges[which + 1])


def _fit(image: object) -> np.ndarray:
    from PIL import Image

    assert isinstance(image, Image.Image)
    return np.asarray(image.convert("RGB").resize((TILE, TILE), Image.Resampling.BILINEAR))


def _easy_vqa(which: int, rng: np.random.Generator) -> list[Tile]:
    """Cut the shapes out of easy-VQA, with a little of their background."""
    import json

    from PIL import Image

    # test tiles come from the data set's test images; train and validation divide its training images
    folder = easy_vqa_folder() / ("test" if which == 2 else "train")
    colour_of: dict[int, str] = {}
    shape_of: dict[int, str] = {}
    for _, answer, image_id in json.loads((folder / "questions.json").read_text()):
        if answer in COLOURS:
            colour_of[image_id] = answer
        elif answer in SHAPES:
            shape_of[image_id] = answer
    known = sorted(colour_of.keys() & shape_of.keys())
    known = {0: known[: len(known) * 4 // 5], 1: known[len(known) * 4 // 5 :], 2: known}[which][:1500]
    found = []
    for image_id in known:
        image = Image.open(folder / "images" / f"{image_id}.png").convert("RGB")
        pixels = np.asarray(image).astype(int)
        rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1) > 24)
        side = max(np.ptp(rows), np.ptp(columns)) * rng.uniform(1.05, 1.3) / 2 + 1
        y, x = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
        padded = Image.new("RGB", (192, 192), tuple(int(v) for v in pixels[0, 0]))
        padded.paste(image, (64, 64))
        box = tuple(round(64 + v) for v in (x - side, y - side, x + side, y + side))
        source = f"easy-vqa/{folder.name}/{image_id}"
        found.append(Tile("shape", shape_of[image_id], colour_of[image_id], source, _fit(padded.crop(box))))
    return found


def _drawn_shapes(split: str, rng: np.random.Generator) -> list[Tile]:
    """Draw stars and crosses, which easy-VQA lacks, in its colours: rotated, scaled, on light backgrounds."""
    from PIL import Image, ImageDraw

    found = []
    for name in ("star", "cross"):
        for colour, rgb in COLOURS.items():
            for number in range(40):
                ground = tuple(int(v) for v in rng.integers(215, 256, 3))
                ink = tuple(int(v) for v in np.clip(np.array(rgb) + rng.integers(-15, 16, 3), 0, 255))
                image = Image.new("RGB", (72, 72), ground)
                turn, radius = rng.uniform(0, 2 * np.pi), rng.uniform(26, 35)
                if name == "star":
                    angles = turn + np.arange(10) * np.pi / 5
                    radii = np.where(np.arange(10) % 2 == 0, radius, 0.42 * radius)
                else:
                    thin = 0.28
                    corners = np.array([(1, thin), (thin, thin), (thin, 1), (-thin, 1), (-thin, thin), (-1, thin)])
                    corners = np.concatenate([corners, -corners])
                    angles = np.arctan2(corners[:, 1], corners[:, 0]) + turn
                    radii = radius * np.hypot(corners[:, 0], corners[:, 1])
                points = [(36 + r * np.cos(a), 36 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]
                ImageDraw.Draw(image).polygon(points, fill=ink)
                found.append(Tile("shape", name, colour, f"drawn/{split}/{name}/{colour}/{number}", _fit(image)))
    return found


def _digits(which: int) -> list[Tile]:
    """Return scikit-learn's handwritten digits (8 x 8), dark on light."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    found = []
    for i in _share(len(data.target), which):
        grey = Image.fromarray((245 - data.images[i] * 14).astype(np.uint8))
        found.append(Tile("digit", DIGITS[data.target[i]], None, f"digits/{i}", _fit(grey)))
    return found


def _words(split: str, rng: np.random.Generator) -> list[Tile]:
    """Render words of three letters in PIL's own font, with varying size, position and grey value."""
    from PIL import Image, ImageDraw, ImageFont

    found = []
    for word in WORDS:
        for number in range(40):
            paper, ink = int(rng.integers(225, 256)), int(rng.integers(0, 60))
            image = Image.new("L", (72, 72), paper)
            size = float(rng.uniform(36, 42))
            place = (36 + rng.uniform(-2, 2), 36 + rng.uniform(-8, 8))
            ImageDraw.Draw(image).text(place, word, fill=ink, font=ImageFont.load_default(size), anchor="mm")
            found.append(Tile("word", word, None, f"words/{split}/{word}/{number}", _fit(image)))
    return found


def _photographs(which: int, rng: np.random.Generator) -> list[Tile]:
    """Crop scikit-image's photographs."""
    from PIL import Image

    found = []
    for name, file in TEXTURES.items():
        image = Image.open(photograph(file)).convert("RGB")
        band = _share(image.width, which)
        for _ in range(60):
            side = int(rng.integers(44, 56))
            left = int(rng.integers(band.start, band.stop - side))
            top = int(rng.integers(0, image.height - side))
            crop = image.crop((left, top, left + side, top + side))
            found.append(Tile("photo", name, None, f"{file}/{left}-{left + side}", _fit(crop)))
    for name, (file, (left, top, right, bottom)) in THINGS.items():
        image = Image.open(photograph(file)).convert("RGB")
        # the left edge of a window, modulo 3, is its split, so no window is in two splits
        for _ in range(60):
            side = int(min(right - left, bottom - top) * rng.uniform(0.75, 1.0))
            x = left + int(rng.integers(0, right - left - side + 1)) // 3 * 3 + which
            y = top + int(rng.integers(0, bottom - top - side + 1))
            crop = image.crop((x, y, x + side, y + side))
            found.append(Tile("photo", name, None, f"{file}/{x},{y},{side}", _fit(crop)))
    return found


def _faces(which: int) -> list[Tile]:
    """Return the faces of scikit-image's LFW subset: 100 grey images of 25 x 25."""
    from PIL import Image

    faces = np.load(photograph("lfw_subset.npy"))[:100]
    return [
        Tile("photo", "face", None, f"lfw/{i}", _fit(Image.fromarray((faces[i] * 255).astype(np.uint8))))
        for i in _share(100, which)
    ]
