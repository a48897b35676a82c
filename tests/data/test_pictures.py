"""Pictures are read as they are meant: orientation, transparency, depth; compared with values known by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from covft.data import DataError, ImageDecoder, ImageFolder
from covft.errors import ConfigError
from tests.helpers.memory import peak_bytes

decode = ImageDecoder()


def encode(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data, decoder=decode):
    picture = decoder(data, "x")
    assert picture.mode == "RGB"
    return np.array(picture).tolist()


def png(width, height, bits, kind, rows, *chunks):
    """Write a PNG by hand: IHDR, other chunks, rows without a filter."""
    raw = zlib.compress(b"".join(b"\0" + row for row in rows))
    head = ("IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    parts = [
        struct.pack(">I", len(data)) + name.encode() + data + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in [head, *chunks, ("IDAT", raw), ("IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ------------------------------------------------------------------------------------------ orientation

A, B, C, D, E, F = ([value] * 3 for value in (10, 50, 90, 130, 170, 210))
# Stored as two rows, A B C and D E F; the first row of the EXIF table is where row 0 and column 0 of the scene lie.
TURNED = {
    1: [[A, B, C], [D, E, F]],
    2: [[C, B, A], [F, E, D]],
    3: [[F, E, D], [C, B, A]],
    4: [[D, E, F], [A, B, C]],
    5: [[A, D], [B, E], [C, F]],
    6: [[D, A], [E, B], [F, C]],
    7: [[F, C], [E, B], [D, A]],
    8: [[C, F], [B, E], [A, D]],
    9: [[A, B, C], [D, E, F]],  # not an orientation
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation(orientation, kind):
    picture = Image.fromarray(np.array([[A, B, C], [D, E, F]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert pixels(data) == TURNED[orientation]


def test_a_photograph_that_was_held_upright():
    """A JPEG with a bright left half and orientation 6 shows a bright upper half."""
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    read = np.array(decode(encode(picture, "JPEG", exif=exif), "x"))
    assert read.shape == (64, 32, 3)
    assert read[:32].mean() > 250 > 5 > read[32:].mean()


def test_damaged_exif_data_does_not_lose_the_picture():
    data = encode(
        Image.new("RGB", (3, 2), (9, 8, 7)), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12" + b"\xff" * 40
    )
    assert pixels(data) == [[[9, 8, 7]] * 3] * 2


# ----------------------------------------------------------------------------------------- transparency


def over(value, alpha, ground=255):
    return round((value * alpha + ground * (255 - alpha)) / 255)


def palette(**options):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.putdata([0, 1])
    return encode(picture, "PNG", **options)


@pytest.mark.parametrize(
    ("data", "want"),
    [
        # Black writing on transparency, as in most diagrams of the web.
        (encode(Image.new("RGBA", (2, 1), (0, 0, 0, 0)), "PNG"), [[[255] * 3] * 2]),
        (encode(Image.new("RGBA", (1, 1), (0, 0, 0, 255)), "PNG"), [[[0] * 3]]),
        (
            encode(Image.new("RGBA", (1, 1), (200, 100, 0, 128)), "PNG"),
            [[[over(200, 128), over(100, 128), over(0, 128)]]],
        ),
        (encode(Image.new("LA", (1, 1), (0, 64)), "PNG"), [[[over(0, 64)] * 3]]),
        (palette(transparency=0), [[[255] * 3, [200, 100, 50]]]),
        (palette(transparency=b"\xff\x80"), [[[0] * 3, [over(200, 128), over(100, 128), over(50, 128)]]]),
        (palette(), [[[0] * 3, [200, 100, 50]]]),
        (encode(Image.fromarray(np.array([[7, 9]], np.uint8)), "PNG", transparency=7), [[[255] * 3, [9] * 3]]),
        (encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), [[[255] * 3]]),
        (encode(Image.new("RGB", (1, 1), (1, 2, 4)), "PNG", transparency=(1, 2, 3)), [[[1, 2, 4]]]),
        (encode(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), "WEBP", lossless=True, exact=True), [[[255] * 3]]),
        (encode(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), "TIFF"), [[[255] * 3]]),
        (encode(Image.new("P", (1, 1), 0), "GIF", transparency=0), [[[255] * 3]]),
        # 16-bit grey with a transparent value, and with an alpha channel.
        (
            png(2, 1, 16, 0, [struct.pack(">2H", 0x0700, 0x0701)], ("tRNS", struct.pack(">H", 0x0700))),
            [[[255] * 3, [7] * 3]],
        ),
        (png(2, 1, 16, 4, [struct.pack(">4H", 0, 0, 0x6400, 0xFFFF)]), [[[255] * 3, [100] * 3]]),
    ],
)
def test_transparency_lies_on_white(data, want):
    assert np.abs(np.array(pixels(data)) - np.array(want)).max() <= 1  # rounding of PIL
    assert np.shape(pixels(data)) == np.shape(want)


def test_the_ground_is_an_option():
    data = encode(Image.new("RGBA", (1, 1), (200, 100, 0, 0)), "PNG")
    assert pixels(data, ImageDecoder(background=(1, 2, 3))) == [[[1, 2, 3]]]
    assert pixels(data, ImageDecoder(background=None)) == [[[200, 100, 0]]]
    assert pixels(palette(transparency=0), ImageDecoder(background=None)) == [[[0] * 3, [200, 100, 50]]]


# ------------------------------------------------------------------------------------ depth and colours

DEPTHS = np.array([[0, 0x0100, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_of_16_bits_is_scaled(kind):
    assert pixels(encode(Image.fromarray(DEPTHS), kind)) == [[[value] * 3 for value in (0, 1, 127, 128, 255)]]


def test_grey_of_12_bits_is_scaled():
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    strip = bytes([0xFF, 0xF8, 0x00])  # 0xFFF and 0x800
    data = b"II*\0" + struct.pack("<I", 12) + strip + b"\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    assert pixels(data) == [[[255] * 3, [128] * 3]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_32_bits_is_refused(dtype):
    with pytest.raises(DataError, match="grey of 32 bits, whose black and white are not known"):
        decode(encode(Image.fromarray(np.array([[0, 70_000]], dtype)), "TIFF"), "x")


@pytest.mark.parametrize(
    ("picture", "kind", "want"),
    [
        (Image.new("1", (2, 1), 1), "PNG", [[[255] * 3] * 2]),
        (Image.new("L", (1, 1), 77), "PNG", [[[77] * 3]]),
        (Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "TIFF", [[[255] * 3]]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF", [[[255, 0, 0]]]),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG", [[[0] * 3] * 8] * 8),
    ],
)
def test_other_colours(picture, kind, want):
    assert pixels(encode(picture, kind)) == want


def test_16_bits_of_colour_keep_their_upper_half():
    data = png(1, 1, 16, 2, [struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)])
    assert pixels(data) == [[[0x12, 0x56, 0x9A]]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    assert pixels(data) == [[[255, 0, 0]] * 8] * 8


# ------------------------------------------------------------------------------------------------ limits


def test_more_pixels_than_allowed_are_not_decoded():
    data = encode(Image.new("L", (3000, 3000)), "PNG")
    small = ImageDecoder(max_pixels=8_999_999)

    def refuse():
        with pytest.raises(DataError, match=r"The image x has 3000 x 3000 pixels, more than max_pixels=8,999,999"):
            small(data, "x")

    assert peak_bytes(refuse) < 4_000_000
    assert ImageDecoder(max_pixels=9_000_000)(data, "x").size == (3000, 3000)


@pytest.mark.parametrize("side", [9460, 20_000, 2_000_000_000])
def test_bombs_are_errors(side):
    """A header that promises more than PIL's limit (where it only warns) or twice that."""
    with pytest.raises(DataError, match=r"more than max_pixels=89,478,485"):
        decode(png(side, side, 8, 0, []), "x")


def test_more_bytes_than_allowed_are_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(200 << 20)  # takes no space on the disk
    folder = ImageFolder(tmp_path)

    def refuse():
        with pytest.raises(DataError, match=r"x.png has 209,715,200 bytes, more than the limit of 134,217,728"):
            folder.open("x.png")

    assert peak_bytes(refuse) < 4_000_000
    with pytest.raises(DataError, match="the limit of 10"):
        ImageDecoder(max_bytes=10)(b"x" * 11, "x")


SIDE = 1200
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
LARGE = {
    "JPEG": (NOISE[..., :3], {}),
    "PNG": (NOISE, {"compress_level": 1}),
    "TIFF": (NOISE, {}),
    "WEBP": (NOISE // 255, {"method": 0}),
    "JPEG2000": (NOISE // 255, {}),
    "GIF": (NOISE[..., 0], {}),
    "I;16": (NOISE[..., 0].astype(np.uint16), {"transparency": 1, "compress_level": 1}),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_picture_takes_what_is_stated(kind):
    values, options = LARGE[kind]
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        options = {**options, "exif": exif}
    data = encode(Image.fromarray(np.ascontiguousarray(values)), "PNG" if kind == "I;16" else kind, **options)
    decode(data, "x")  # loads the decoder itself
    peak = peak_bytes(lambda: decode(data, "x"))
    assert 3 * SIDE**2 < peak < len(data) + 28 * SIDE**2 + 4_000_000


def test_formats_that_start_programs_are_not_read():
    eps = encode(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(DataError, match="UnidentifiedImageError"):
        decode(eps, "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
def test_cut_files_are_errors(kind):
    data = encode(Image.fromarray(NOISE[:64, :64, :3].copy()), kind)
    for size in (0, 1, 20, len(data) // 2, len(data) - 30):
        with pytest.raises(DataError, match="The image x cannot be decoded"):
            decode(data[:size], "x")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_bytes": 0},
        {"max_bytes": 1.5},
        {"max_pixels": "1"},
        {"max_pixels": True},
        {"background": "white"},
        {"background": (1, 2)},
        {"background": (1, 2, 256)},
        {"background": (1, 2, None)},
    ],
)
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ImageDecoder(**settings)
