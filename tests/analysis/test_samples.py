"""Data of every form is read into the same batches."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from covft.analysis.samples import batches
from covft.data import Collator, ConversationDataset, ImageText, Place, Row
from covft.errors import ConfigError, ShapeError
from covft.testing import tiny_llava
from tests.helpers.data import to_tensor

IMAGES = torch.arange(5 * 3 * 4 * 4, dtype=torch.float32).view(5, 3, 4, 4)
TEXTS, KINDS = ["a", "b", "c", "d", "e"], ["x", "y", "x", "y", "x"]


def _row(images, text):
    ids = torch.arange(3)
    return {"input_ids": ids, "labels": ids, "pixel_values": images, "num_tiles": [1], "context_text": text, "row": 0}


def _forms():
    yield "samples", list(zip(IMAGES, TEXTS, KINDS, strict=True))
    yield "batches", [(IMAGES[:3], TEXTS[:3], KINDS[:3]), [IMAGES[3:], tuple(TEXTS[3:]), tuple(KINDS[3:])]]
    yield "lists", [(list(IMAGES), TEXTS, KINDS)]
    rows = [_row(image[None], text) for image, text in zip(IMAGES, TEXTS, strict=True)]
    yield "rows", [{**row, "kind": kind} for row, kind in zip(rows, KINDS, strict=True)]
    rows.insert(2, _row(None, "no image"))
    yield "collated", [{**Collator(0)(rows), "kind": [*KINDS[:2], "z", *KINDS[2:]]}]


@pytest.mark.parametrize(("form", "data"), list(_forms()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_form_gives_the_same_batches(form, data):
    found = list(batches(data, size=2))
    assert [len(batch) for batch in found] == [2, 2, 1]
    assert torch.equal(torch.cat([batch.images for batch in found]), IMAGES)
    assert [text for batch in found for text in batch.text] == TEXTS
    assert [kind for batch in found for kind in batch.kinds] == KINDS
    assert [batch.index.tolist() for batch in found] == [[0, 1], [0, 1], [0]]


def test_tiles_are_counted_with_their_sample():
    batch = next(batches([(IMAGES[:3], "a"), (IMAGES[3:], "b")]))
    assert batch.index.tolist() == [0, 0, 0, 1, 1]
    assert batch.texts == ("a", "b")
    assert batch.kinds == (None, None)


class Source:
    """Rows of a mixture: two data sets, one row without an image."""

    rows = (("left", "a.png", "box"), ("nothing", None, "chat"), ("right", "b.png", "caption"))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        question, image, name = self.rows[index]
        content = f"<image>\n{question}" if image else question
        messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "Yes."})
        return Row(messages, (image,) if image else (), dataset=name)

    def place(self, index):
        return Place("rows", index)

    def image(self, index, name):
        return Image.new("RGB", (8, 8), (name[0] == "a" and "white") or "black")


def test_a_data_set_of_conversations_has_the_names_of_its_mixture_as_kinds():
    data = ConversationDataset(Source(), tiny_llava(depth=1).tokenizer, to_tensor(4), image_text=ImageText("<image>"))
    batch = next(batches(data))
    assert (batch.texts, batch.kinds) == (("left", "right"), ("box", "caption"))
    assert batch.images.shape == (2, 3, 4, 4)
    assert batch.samples[1].source["row"] == 2


def test_images_of_another_size_start_another_batch():
    data = [(IMAGES[0], "a"), (torch.rand(3, 8, 8), "b"), (IMAGES[1], "c")]
    assert [batch.texts for batch in batches(data)] == [("a",), ("b",), ("c",)]


def test_features_stand_for_texts():
    batch = next(batches([(IMAGES, torch.eye(5))]))
    assert torch.equal(batch.text, torch.eye(5))


def test_arguments_of_the_model_are_left_as_they_are():
    given = {"input_ids": torch.zeros(2, 7), "pixel_values": torch.rand(12, 6), "image_grid_thw": torch.ones(2, 3)}
    before, batch = batches([(IMAGES[0], "a"), {**given, "kind": ["x", "y"]}])
    assert before.texts == ("a",)
    assert batch.kinds == ("x", "y")
    assert batch.images is None
    assert batch.text is None
    assert dict(batch.inputs) == given
    texts = {**given, "pixel_values": IMAGES[:2], "context_text": ["a", "b"]}
    del texts["image_grid_thw"]  # rows of tokens: which row an image is of, only the placeholders tell
    assert next(batches([texts])).images is None


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (IMAGES, ConfigError),
        ((IMAGES, TEXTS[:2]), ShapeError),
        ((IMAGES, TEXTS, KINDS[:2]), ShapeError),
        (("image.png", "a"), ShapeError),
        ({"pixel_values": IMAGES}, ConfigError),
        ({"pixel_values": IMAGES, "context_text": TEXTS[:2]}, ShapeError),
    ],
)
def test_what_cannot_be_read_is_refused(entry, error):
    with pytest.raises(error, match="Expected"):
        list(batches([entry]))
