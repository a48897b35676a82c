"""Long thin pictures: what they take is bounded, and ordinary ones stay as LLaVA and InternVL have them."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from covft.data import ConversationDataset, DataError, DynamicTiling, JpegAugment, LlavaRows, NoTiling, PadToSquare
from tests.helpers.data import TEXT, build_tokenizer, talk, to_tensor, write
from tests.helpers.memory import peak_bytes


def test_a_strip_is_reduced_before_it_is_padded():
    strip = Image.new("RGB", (65_000, 1), "red")
    padded = []
    # 4 bytes per pixel of the largest square; of its own length it would be 16 GiB.
    assert peak_bytes(lambda: padded.extend(PadToSquare()(strip))) < 4 * 8192**2 + (8 << 20)
    (square,) = padded
    assert square.size == (8192, 8192)
    row = np.array(square.crop((0, 4090, 8192, 4100)))[:, 0].tolist()
    assert row.count([255, 0, 0]) == 1
    assert row.count([122, 116, 104]) == 9


@pytest.mark.parametrize(
    ("size", "want"), [((16, 4), 8), ((4, 16), 8), ((8, 8), 8), ((9, 9), 8), ((8, 2), 8), ((6, 3), 6)]
)
def test_sides_of_squares(size, want):
    (square,) = PadToSquare(max_side=8)(Image.new("RGB", size))
    assert square.size == (want, want)


def test_photographs_of_48_megapixels_are_padded_as_they_are():
    image = Image.new("RGB", (8064, 6048), "red")
    (square,) = PadToSquare()(image)
    assert square.size == (8064, 8064)
    assert np.array(square.crop((0, 1007, 1, 1009))).tolist() == [[[122, 116, 104]], [[255, 0, 0]]]


@pytest.mark.parametrize("size", [(800, 1), (1, 800), (201, 1), (40_000, 199)])
def test_an_image_processor_is_not_given_strips(size):
    with pytest.raises(DataError, match=f"An image of {size[0]} x {size[1]} pixels is more than 200 times"):
        NoTiling()(Image.new("RGB", size))


@pytest.mark.parametrize(("size", "ratio"), [((200, 1), 200), ((640, 480), 200), ((800, 1), 1000), ((5, 5), 1)])
def test_others_pass_unchanged(size, ratio):
    image = Image.new("RGB", size)
    assert NoTiling(max_aspect_ratio=ratio)(image) == [image]


def test_tiles_of_a_strip_are_bounded():
    strip = Image.new("RGB", (65_000, 1))
    tiles = []
    assert peak_bytes(lambda: tiles.extend(DynamicTiling()(strip))) < 4 * 448**2 * 2 * 13 + (8 << 20)
    assert [tile.size for tile in tiles] == [(448, 448)] * 13


@pytest.fixture
def strip(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (800, 1)).save(buffer, "PNG")
    (tmp_path / "strip.png").write_bytes(buffer.getvalue())
    record = {"image": "strip.png", "conversations": talk("<image>\nWhat is it?", "A line.")}
    return LlavaRows(write(tmp_path / "rows.jsonl", [record]), tmp_path)


def test_a_strip_in_a_data_set(strip):
    """Unbounded, the processor of CLIP makes 90 million pixels of it, 0.6 GiB."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    data = ConversationDataset(strip, build_tokenizer("vicuna"), processor, image_text=TEXT)
    processor(Image.new("RGB", (8, 8)), return_tensors="pt")
    found = []
    assert peak_bytes(lambda: found.extend(data.check())) < 16 << 20
    assert "more than 200 times as long as it is wide" in found[0].reason
    padded = ConversationDataset(strip, build_tokenizer("vicuna"), processor, image_text=TEXT, tiling=PadToSquare())
    assert padded[0]["pixel_values"].shape == (1, 3, 336, 336)


@pytest.mark.parametrize("error", [ValueError("thin"), RuntimeError("thin"), ZeroDivisionError("thin")])
def test_an_image_that_the_processor_refuses(strip, error):
    def refuse(image):
        raise error

    data = ConversationDataset(strip, build_tokenizer("vicuna"), refuse, image_text=TEXT, tiling=PadToSquare())
    assert "The image processor refuses an image: thin" in data.check()[0].reason


def test_a_full_device_is_not_a_broken_row(strip):
    def fill(image):
        raise torch.cuda.OutOfMemoryError("full")

    data = ConversationDataset(strip, build_tokenizer("vicuna"), fill, image_text=TEXT, tiling=PadToSquare())
    with pytest.raises(torch.cuda.OutOfMemoryError):
        data[0]


def test_an_image_too_long_for_jpeg():
    with pytest.raises(DataError, match="70000 x 1 cannot be compressed"):
        JpegAugment()(Image.new("RGB", (70_000, 1)), random.Random(0))


def test_more_images_than_fit_are_not_opened(tmp_path):
    record = {"image": ["none.png"] * 30, "conversations": talk("<image>" * 30 + "?", "So.")}
    rows = LlavaRows(write(tmp_path / "rows.jsonl", [record]), tmp_path)
    data = ConversationDataset(rows, build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT, max_length=100)
    assert data.check()[0].reason.startswith("The row names 30 images of at least 120 tokens: max_length=100 truncates")
