"""Arguments of the wrong kind: every public function and class of `covft.data` raises a CoVFTError."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from covft import data
from covft.errors import CoVFTError
from tests.helpers.data import RECORDS, build_tokenizer, pack, to_tensor

WRONG = {
    "path": [None, 3, 1.5, True, b"x", [], {}, object(), "a\0b"],
    "flag": [None, "False", "true", 0, 1, []],
    "number": [None, "3", 1.5, True, [], float("nan")],
    "count": [None, "3", 1.5, True, [], 0, -1, float("nan"), float("inf")],
    "text": [3, 1.5, True, [], {}, b"x"],
    "image": [None, 3, "x.png", np.zeros((2, 2, 3)), torch.zeros(3, 2, 2), []],
    "color": [None, 3, "white", (1, 2), (1, 2, 256), (1, 2, -1), (0.5, 0.5, 0.5), "abc"],
    "tokenizer": [None, 3, "llava", []],
    "messages": [None, 3, "Who?", [3], [{}], [{"role": "user"}], [{"role": "user", "content": 3}]],
    "store": [3, True, [], {}, object(), "none-such-folder"],
    "index": [None, "0", 1.5, [], (0,)],
    "samples": [None, 3, "x", [], [3], [{}], [{"input_ids": [1]}], {}],
    "object": [3, "x", []],
}
PICTURE = Image.new("RGB", (4, 4))
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


class Parts:
    """Good objects that the calls need, made once."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = build_tokenizer("vicuna")
        self.rows = data.LlavaRows(folder / "llava.json", folder / "images")
        self.dataset = data.ConversationDataset(
            self.rows, self.tokenizer, to_tensor(8), image_text=data.ImageText(per_tile=4)
        )
        self.shards = data.TarImages(pack(folder, ["coco/cat.jpg"]))
        self.entry = data.MetaEntry("x", str(folder / "llava.jsonl"), str(folder / "images"))
        self.mixture = data.InternVLRows([self.entry])

    def make(self, **options):
        return data.ConversationDataset(
            self.rows, self.tokenizer, to_tensor(8), **{"image_text": data.ImageText(per_tile=4), **options}
        )


CALLS = {
    "LlavaRows(annotation)": ("path", lambda p, x: data.LlavaRows(x)),
    "LlavaRows(images)": ("store", lambda p, x: data.LlavaRows(p.folder / "llava.json", x)),
    "LlavaRows(image_first)": ("flag", lambda p, x: data.LlavaRows(p.folder / "llava.json", image_first=x)),
    "LlavaRows[]": ("index", lambda p, x: p.rows[x]),
    "LlavaRows.place": ("index", lambda p, x: p.rows.place(x)),
    "LlavaRows.image": ("text", lambda p, x: p.rows.image(0, x)),
    "InternVLRows(meta)": ("path", lambda p, x: data.InternVLRows(x)),
    "InternVLRows([meta])": ("object", lambda p, x: data.InternVLRows([x])),
    "InternVLRows(images)": ("object", lambda p, x: data.InternVLRows([p.entry], images=x or 3)),
    "InternVLRows(store)": ("store", lambda p, x: data.InternVLRows([p.entry], images={"x": x})),
    "InternVLRows[]": ("index", lambda p, x: p.mixture[x]),
    "InternVLRows.place": ("index", lambda p, x: p.mixture.place(x)),
    "InternVLRows.image": ("index", lambda p, x: p.mixture.image(x, "coco/cat.jpg")),
    "MetaEntry(name)": ("text", lambda p, x: data.MetaEntry(x, "a")),
    "MetaEntry(annotation)": ("text", lambda p, x: data.MetaEntry("x", x)),
    "MetaEntry(root)": ("text", lambda p, x: data.MetaEntry("x", "a", root=x)),
    "MetaEntry(data_augment)": ("flag", lambda p, x: data.MetaEntry("x", "a", data_augment=x)),
    "read_meta": ("path", lambda p, x: data.read_meta(x)),
    "QuestionRows": ("path", lambda p, x: data.QuestionRows(x)),
    "open_rows(images)": ("store", lambda p, x: data.open_rows(p.folder / "llava.json", x)),
    "open_rows": ("path", lambda p, x: data.open_rows(x)),
    "JsonRecords": ("path", lambda p, x: data.JsonRecords(x)),
    "JsonRecords[]": ("index", lambda p, x: p.rows.records[x]),
    "DatasetsRows": ("object", lambda p, x: data.DatasetsRows(x)),
    "ImageFolder(root)": ("path", lambda p, x: data.ImageFolder(x)),
    "ImageFolder(allow_absolute)": ("flag", lambda p, x: data.ImageFolder(p.folder, allow_absolute=x)),
    "ImageFolder(follow_links)": ("flag", lambda p, x: data.ImageFolder(p.folder, follow_links=x)),
    "ImageFolder(decoder)": ("object", lambda p, x: data.ImageFolder(p.folder, decoder=x)),
    "ImageFolder.open": ("text", lambda p, x: data.ImageFolder(p.folder).open(x)),
    "TarImages": ("path", lambda p, x: data.TarImages(x)),
    "TarImages(decoder)": ("object", lambda p, x: data.TarImages(p.folder / "0.tar", decoder=x)),
    "TarImages.open": ("text", lambda p, x: p.shards.open(x)),
    "ImageDecoder(max_bytes)": ("count", lambda p, x: data.ImageDecoder(max_bytes=x)),
    "ImageDecoder(max_pixels)": ("count", lambda p, x: data.ImageDecoder(max_pixels=x)),
    "ImageDecoder(background)": ("text", lambda p, x: data.ImageDecoder(background=x)),
    "ImageDecoder()": ("image", lambda p, x: data.ImageDecoder()(x, "x")),
    "JpegAugment(low)": ("count", lambda p, x: data.JpegAugment(low=x)),
    "JpegAugment(high)": ("count", lambda p, x: data.JpegAugment(high=x)),
    "JpegAugment()": ("image", lambda p, x: data.JpegAugment()(x, random.Random(0))),
    "JpegAugment(rng)": ("object", lambda p, x: data.JpegAugment()(PICTURE, x)),
    "tile_grid(width)": ("count", lambda p, x: data.tile_grid(x, 3)),
    "tile_grid(height)": ("count", lambda p, x: data.tile_grid(3, x)),
    "tile_grid(max_tiles)": ("count", lambda p, x: data.tile_grid(3, 3, max_tiles=x)),
    "tile_image": ("image", lambda p, x: data.tile_image(x)),
    "tile_image(tile_size)": ("count", lambda p, x: data.tile_image(PICTURE, tile_size=x)),
    "tile_image(thumbnail)": ("flag", lambda p, x: data.tile_image(PICTURE, thumbnail=x)),
    "pad_to_square": ("image", lambda p, x: data.pad_to_square(x)),
    "pad_to_square(color)": ("color", lambda p, x: data.pad_to_square(PICTURE, x)),
    "pad_to_square(max_side)": ("count", lambda p, x: data.pad_to_square(PICTURE, max_side=x)),
    "PadToSquare(color)": ("color", lambda p, x: data.PadToSquare(x)),
    "PadToSquare(max_side)": ("count", lambda p, x: data.PadToSquare(max_side=x)),
    "PadToSquare()": ("image", lambda p, x: data.PadToSquare()(x)),
    "NoTiling(max_aspect_ratio)": ("text", lambda p, x: data.NoTiling(None if x == 3 or x == 1.5 else x)),
    "NoTiling()": ("image", lambda p, x: data.NoTiling()(x)),
    "DynamicTiling(min_tiles)": ("count", lambda p, x: data.DynamicTiling(min_tiles=x)),
    "DynamicTiling(max_tiles)": ("count", lambda p, x: data.DynamicTiling(max_tiles=x)),
    "DynamicTiling(tile_size)": ("count", lambda p, x: data.DynamicTiling(tile_size=x)),
    "DynamicTiling(thumbnail)": ("flag", lambda p, x: data.DynamicTiling(thumbnail=x)),
    "DynamicTiling()": ("image", lambda p, x: data.DynamicTiling()(x)),
    "DynamicTiling()(max_tiles)": ("object", lambda p, x: data.DynamicTiling()(PICTURE, x if x != 3 else 0)),
    "ImageText(token)": ("text", lambda p, x: data.ImageText(x)),
    "ImageText(per_tile)": ("count", lambda p, x: data.ImageText(per_tile=x)),
    "ImageText(before)": ("text", lambda p, x: data.ImageText(before=x)),
    "ImageText(after)": ("text", lambda p, x: data.ImageText(after=x)),
    "ImageText()": ("count", lambda p, x: data.ImageText()(x)),
    "ImageText.token_id": ("tokenizer", lambda p, x: data.ImageText().token_id(x)),
    "ImageText.expand": ("messages", lambda p, x: data.ImageText().expand(x, [])),
    "ImageText.expand(tiles)": ("object", lambda p, x: data.ImageText().expand(TURNS, x or 3)),
    "parse_row": ("path", lambda p, x: data.parse_row(x)),
    "parse_row(add_missing_tag)": ("flag", lambda p, x: data.parse_row(RECORDS[0], add_missing_tag=x)),
    "to_messages": ("messages", lambda p, x: data.to_messages(x)),
    "clean_instruction": ("text", lambda p, x: data.clean_instruction(x)),
    "instruction_text": ("messages", lambda p, x: data.instruction_text(x)),
    "instruction_text(turns)": ("path", lambda p, x: data.instruction_text(RECORDS[0], x)),
    "instruction_text(placeholders)": ("text", lambda p, x: data.instruction_text(RECORDS[0], placeholders=x or 3)),
    "encode_conversation(tokenizer)": ("tokenizer", lambda p, x: data.encode_conversation(x, TURNS)),
    "encode_conversation(messages)": ("messages", lambda p, x: data.encode_conversation(p.tokenizer, x)),
    "encode_conversation(chat_template)": (
        "text",
        lambda p, x: data.encode_conversation(p.tokenizer, TURNS, chat_template=x),
    ),
    "encode_conversation(end_of_turn)": (
        "text",
        lambda p, x: data.encode_conversation(p.tokenizer, TURNS, end_of_turn=x),
    ),
    "ConversationDataset(source)": ("path", lambda p, x: data.ConversationDataset(x, p.tokenizer)),
    "ConversationDataset(tokenizer)": ("tokenizer", lambda p, x: data.ConversationDataset(p.rows, x)),
    "ConversationDataset(image_processor)": (
        "object",
        lambda p, x: data.ConversationDataset(p.rows, p.tokenizer, x),
    ),
    "ConversationDataset(image_text)": ("object", lambda p, x: p.make(image_text=x)),
    "ConversationDataset(tiling)": ("object", lambda p, x: p.make(tiling=x)),
    "ConversationDataset(max_length)": ("count", lambda p, x: p.make(max_length=0 if x is None else x)),
    "ConversationDataset(turns)": ("path", lambda p, x: p.make(turns=x)),
    "ConversationDataset(empty_instruction)": ("text", lambda p, x: p.make(empty_instruction=x)),
    "ConversationDataset(chat_template)": ("text", lambda p, x: p.make(chat_template=x)),
    "ConversationDataset(end_of_turn)": ("text", lambda p, x: p.make(end_of_turn=x)),
    "ConversationDataset(system)": ("text", lambda p, x: p.make(system=x)),
    "ConversationDataset(images_only)": ("flag", lambda p, x: p.make(images_only=x)),
    "ConversationDataset(augment)": ("object", lambda p, x: p.make(augment=x)),
    "ConversationDataset(max_broken)": ("path", lambda p, x: p.make(max_broken=-1 if x == 3 or x == 1.5 else x)),
    "ConversationDataset(seed)": ("number", lambda p, x: p.make(seed=x)),
    "ConversationDataset(class)": ("flag", lambda p, x: p.make(tiling=data.PadToSquare)),
    "ConversationDataset[]": ("index", lambda p, x: p.dataset[x]),
    "ConversationDataset.check": ("object", lambda p, x: p.dataset.check([x] if x != 3 else 3)),
    "Collator(pad_token_id)": ("number", lambda p, x: data.Collator(x)),
    "Collator(image_shape)": ("object", lambda p, x: data.Collator(0, x)),
    "Collator(dummies)": ("path", lambda p, x: data.Collator(0, dummies=x)),
    "Collator(padding_side)": ("path", lambda p, x: data.Collator(0, padding_side=x)),
    "Collator(pad_to_multiple_of)": ("count", lambda p, x: data.Collator(0, pad_to_multiple_of=x)),
    "Collator()": ("samples", lambda p, x: data.Collator(0)(x)),
    "drop_dummies(features)": ("object", lambda p, x: data.drop_dummies(x, torch.ones(1))),
    "drop_dummies(image_flags)": ("object", lambda p, x: data.drop_dummies(torch.ones(1, 2), x)),
    "ModalityGroupedSampler(lengths)": (
        "samples",
        lambda p, x: data.ModalityGroupedSampler(3 if x in ([], [3]) else x, 1),
    ),
    "ModalityGroupedSampler(batch_size)": ("count", lambda p, x: data.ModalityGroupedSampler([1], x)),
    "ModalityGroupedSampler(world_size)": ("count", lambda p, x: data.ModalityGroupedSampler([1], 1, world_size=x)),
    "ModalityGroupedSampler(seed)": ("number", lambda p, x: data.ModalityGroupedSampler([1], 1, seed=x)),
    "ModalityGroupedSampler(pool)": ("count", lambda p, x: data.ModalityGroupedSampler([1], 1, pool=x)),
    "ModalityGroupedSampler.set_epoch": ("number", lambda p, x: data.ModalityGroupedSampler([1], 1).set_epoch(x)),
}


def test_every_public_name_is_called():
    """But for constants, protocols, records of results and errors."""
    called = {name.partition("(")[0].partition("[")[0].partition(".")[0] for name in CALLS}
    left = {"CHAT_TEMPLATES", "IGNORE_INDEX", "IMAGE_TAG", "BrokenRow", "DataError", "Encoded", "Place", "Row"}
    protocols = {"ImageStore", "RowSource", "Tiling"}
    elsewhere = {"answer_spans", "instructions_of"}
    missing = set(data.__all__) - called - left - protocols - elsewhere
    assert not missing
    assert sum(len(WRONG[kind]) for kind, _ in CALLS.values()) > 600


@pytest.fixture
def parts(folder):
    return Parts(folder)


def test_wrong_kinds(parts):
    """One test for all: the parts are the same, and a failure names every call that raises something else."""
    wrong = []
    for name, (kind, call) in CALLS.items():
        for value in WRONG[kind]:
            try:
                call(parts, value)
                wrong.append(f"{name} takes {value!r}")
            except CoVFTError as error:
                wrong += [f"{name} with {value!r}: a message of {len(str(error))}"] if len(str(error)) > 2000 else []
            except Exception as error:
                wrong.append(f"{name} with {value!r}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_rows_beyond_the_end_are_index_errors(parts):
    """Python's protocol of sequences, which ends `for row in rows`."""
    for rows in (parts.rows, parts.mixture, parts.dataset, parts.rows.records):
        for index in (len(rows), -len(rows) - 1, 10**30):
            with pytest.raises(IndexError):
                rows[index]
        assert len(list(rows)) == len(rows)
    assert parts.rows[-1].id == "4"
    assert parts.mixture[np.int64(-1)].id == "4"
    assert parts.rows.place(-1).row == 4


def test_a_source_that_does_not_return_rows(parts):
    class Wrong(data.LlavaRows):
        def __getitem__(self, index):
            return super().records[index] if index else {"conversations": []}

    rows = Wrong(parts.folder / "llava.json", parts.folder / "images")
    with pytest.raises(CoVFTError, match="does not return rows"):
        data.ConversationDataset(rows, parts.tokenizer)[0]
