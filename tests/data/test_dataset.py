"""Samples from whole folders, and what happens to rows that are broken."""

import gc
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from covft.data import (
    CHAT_TEMPLATES,
    Collator,
    ConversationDataset,
    DataError,
    DynamicTiling,
    ImageText,
    InternVLRows,
    LlavaRows,
    PadToSquare,
    TarImages,
    encode_conversation,
)
from covft.data.broken import _remove
from covft.errors import ConfigError, ShapeError
from tests.data.conftest import RECORDS, build_tokenizer, photograph, talk, to_tensor, write
from tests.data.test_sources import pack

TEXT = ImageText("<image>", per_tile=4)


def dataset(folder, name="llava.json", **options):
    source = LlavaRows(folder / name, folder / "images")
    settings = {"image_text": TEXT, "tiling": PadToSquare(), **options}
    return ConversationDataset(source, build_tokenizer("vicuna"), to_tensor(8), **settings)


def same(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_samples(folder, name):
    data, tokenizer = dataset(folder, name), build_tokenizer("vicuna")
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert len(data) == 5
    samples = [data[row] for row in range(5)]
    assert [sample["num_tiles"] for sample in samples] == [[1], [], [1], [1, 1], [1]]
    assert [int((sample["input_ids"] == image).sum()) for sample in samples] == [4, 0, 4, 8, 4]
    assert [sample["context_text"] for sample in samples] == [
        "What animal is it?",
        "Who wrote Faust? When?",
        "What is in the cup?",
        "Is in ?",
        "Über was?",
    ]
    assert samples[1]["pixel_values"] is None
    cup = to_tensor(8)(PadToSquare()(photograph("coffee"))[0])
    assert torch.equal(samples[2]["pixel_values"][0], cup)
    assert torch.equal(samples[3]["pixel_values"][1], cup)
    messages = [
        {"role": "user", "content": "<image><image><image><image>\nWhat is in the cup?"},
        {"role": "assistant", "content": "Coffee."},
    ]
    ids, labels = encode_conversation(tokenizer, messages)
    assert torch.equal(samples[2]["input_ids"], ids)
    assert torch.equal(samples[2]["labels"], labels)
    assert data.broken == ()
    assert same(data[-1], samples[4])
    with pytest.raises(IndexError):
        data[5]


def test_instruction_policies(folder):
    assert dataset(folder, turns="first")[1]["context_text"] == "Who wrote Faust?"
    assert dataset(folder, turns="last")[1]["context_text"] == "When?"
    with pytest.raises(ConfigError, match="not known"):
        dataset(folder, turns="some")


def test_real_image_processors(folder):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    source = LlavaRows(folder / "llava.json", folder / "images")
    data = ConversationDataset(source, build_tokenizer("vicuna"), processor, image_text=TEXT)
    want = processor(images=photograph("coffee"), return_tensors="pt")["pixel_values"]
    assert torch.equal(data[2]["pixel_values"], want)
    assert data.image_shape == (3, 28, 28)
    batch = Collator(0, image_shape=data.image_shape)([data[row] for row in range(5)])
    assert batch["pixel_values"].shape == (6, 3, 28, 28)
    assert batch["context_index"].tolist() == [0, 1, 2, 3, 3, 4]


def test_stage_one_sees_images_and_captions_only(folder):
    data = dataset(folder, images_only=True, chat_template=CHAT_TEMPLATES["plain"], end_of_turn="\n")
    sample, tokenizer = data[0], build_tokenizer("vicuna")
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"][:5]) == ["<s>"] + ["<image>"] * 4
    assert tokenizer.decode(sample["input_ids"][5:]) == "A cat.\n"
    assert tokenizer.decode(sample["labels"][sample["labels"] != -100]) == "A cat.\n"
    assert sample["context_text"] == "What animal is it?"


def test_a_system_message_for_rows_without(folder):
    record = {"conversations": [{"from": "system", "value": "Be long."}, *talk("Why?", "So.")]}
    path = write(folder / "system.json", [record, RECORDS[1]])
    data = ConversationDataset(LlavaRows(path), build_tokenizer("vicuna"), system="Be brief.")
    texts = [build_tokenizer("vicuna").decode(data[row]["input_ids"]) for row in (0, 1)]
    assert ["Be long." in text for text in texts] == [True, False]
    assert ["Be brief." in text for text in texts] == [False, True]


# --------------------------------------------------------------------------------------------- InternVL


def internvl(folder, entry, records, **options):
    write(folder / "rows.jsonl", records)
    meta = {"set": {"root": str(folder / "images"), "annotation": str(folder / "rows.jsonl"), **entry}}
    (folder / "meta.json").write_text(json.dumps(meta))
    settings = {
        "image_text": ImageText("<IMG_CONTEXT>", per_tile=2, before="<img>", after="</img>"),
        "tiling": DynamicTiling(max_tiles=6, tile_size=8),
        **options,
    }
    tokenizer = build_tokenizer("internlm_2")
    return ConversationDataset(InternVLRows(folder / "meta.json"), tokenizer, to_tensor(8), **settings)


def test_tiles(folder):
    records = [RECORDS[2], RECORDS[3], RECORDS[1], {**RECORDS[2], "conversations": talk("What?", "Coffee.")}]
    data = internvl(folder, {}, records)
    assert [data[row]["num_tiles"] for row in range(4)] == [[7], [3, 3], [], [7]]
    assert [len(data[row]["pixel_values"]) for row in (0, 1, 3)] == [7, 6, 7]
    text = build_tokenizer("internlm_2").decode(data[1]["input_ids"])
    image = "<img>" + "<IMG_CONTEXT>" * 6 + "</img>"
    assert f"Is{image}in{image}?" in text.replace(" ", "")
    tiles = DynamicTiling(max_tiles=6, tile_size=8)(photograph("coffee"))
    assert torch.equal(data[0]["pixel_values"], torch.stack([to_tensor(8)(tile) for tile in tiles]))


def test_the_limit_of_a_data_set_comes_first(folder):
    data = internvl(folder, {"max_dynamic_patch": 2}, [RECORDS[2], RECORDS[3]])
    assert [data[row]["num_tiles"] for row in range(2)] == [[3], [1, 1]]


def test_augmentation(folder):
    plain = internvl(folder, {"data_augment": False}, [RECORDS[2]] * 3)
    want = plain[0]["pixel_values"]
    assert torch.equal(plain[1]["pixel_values"], want)
    augmented = internvl(folder, {"data_augment": True}, [RECORDS[2]] * 3)
    one = augmented[0]["pixel_values"]
    assert torch.equal(one, augmented[0]["pixel_values"])
    assert not torch.equal(one, want)
    assert (one - want).abs().mean() < 0.05
    others = [augmented[1], augmented[2], internvl(folder, {"data_augment": True}, [RECORDS[2]], seed=1)[0]]
    assert not all(torch.equal(one, other["pixel_values"]) for other in others)


# ------------------------------------------------------------------------------------------- broken rows

GOOD = {"id": "good", "conversations": talk("Who wrote Faust?", "Goethe did.")}
TWO = "<image>\nWhat is it?"


def break_it(folder, kind):
    """A row that cannot be used, and what its report says."""
    image = {"image": "coco/cat.jpg", "conversations": talk(TWO, "A cat.")}
    if kind == "missing image":
        return {**image, "image": "coco/none.jpg"}, "none.jpg cannot be read: No such file"
    if kind == "truncated image":
        path = folder / "images" / "coco/cut.jpg"
        path.write_bytes((folder / "images/coco/cat.jpg").read_bytes()[:5000])
        return {**image, "image": "coco/cut.jpg"}, "cut.jpg cannot be decoded"
    if kind == "malformed conversation":
        return {**image, "conversations": talk(TWO)}, "no question with an answer"
    if kind == "too many tags":
        return {**image, "conversations": talk(TWO + "<image>", "A cat.")}, "Too many <image> tags"
    if kind == "too few tags":
        return {**image, "conversations": talk("What?", "A cat.")}, "Too few <image> tags"
    if kind == "image tokens in the text":
        return {"conversations": talk("What is <IMG_CONTEXT>?", "A token.")}, "1 image tokens, but its images need 0"
    if kind == "no instruction":
        return {**image, "conversations": talk("<image>", "A cat.")}, "hold only images"
    if kind == "too long":
        return {"conversations": talk("Why? " * 50, "So.")}, "leaves no answer"
    if kind == "images cut off":
        many = {"image": ["coco/cat.jpg"] * 20, "conversations": talk("<image>" * 20 + "?", "Cats.")}
        return many, "truncates images"
    raise AssertionError(kind)


KINDS = [
    "missing image",
    "truncated image",
    "malformed conversation",
    "too many tags",
    "too few tags",
    "image tokens in the text",
    "no instruction",
    "too long",
    "images cut off",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_broken_row_is_reported_once_and_replaced(folder, kind, name):
    row, why = break_it(folder, kind)
    write(folder / name, [RECORDS[0], row, GOOD, RECORDS[2]])
    text = ImageText("<IMG_CONTEXT>", per_tile=4) if kind == "image tokens in the text" else TEXT
    data = dataset(folder, name, image_text=text, max_length=100, max_broken=1)
    with pytest.warns(UserWarning, match=r"Skipped a broken row.*row 1") as seen:
        sample = data[1]
    assert len(seen) == 1
    assert sample["row"] == 2
    assert same(sample, data[2])  # and no second warning, which would be an error here
    assert same(sample, data[1])
    (broken,) = data.broken
    assert (broken.file, broken.row, broken.line) == (str(folder / name), 1, 2 if name.endswith("l") else None)
    assert why in broken.reason
    assert str(broken) in str(seen[0].message)


def test_a_line_that_is_not_json_is_a_broken_row(folder):
    path = write(folder / "rows.jsonl", [RECORDS[0], GOOD])
    path.write_text(path.read_text() + '{"conversations": [\n')
    data = dataset(folder, "rows.jsonl", max_broken=1)
    with pytest.warns(UserWarning, match=r"row 2 \(line 3\): The row is not JSON"):
        assert data[2]["row"] == 0
    assert data.modality_lengths()[2] == 1


def test_missing_from_a_shard(folder):
    shards = TarImages(pack(folder, ["coco/cat.jpg", "coco/cup.png"]))
    rows = LlavaRows(folder / "llava.json", shards)
    data = ConversationDataset(rows, build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT, max_broken=1)
    assert data[3]["num_tiles"] == [1, 1]
    with pytest.warns(UserWarning, match="None of the 1 tar shards contains the image vg.rocket.jpg"):
        assert data[4]["row"] == 0


def test_too_many_broken_rows_are_an_error(folder):
    bad = {"conversations": talk("Why?")}
    write(folder / "rows.jsonl", [GOOD] + [bad] * 7)
    data = dataset(folder, "rows.jsonl", max_broken=6)
    with pytest.warns(UserWarning, match="Skipped a broken row") as seen, pytest.raises(DataError) as error:
        data[1]
    assert len(seen) == 7
    message = str(error.value)
    assert message.startswith("7 of 8 rows are broken, more than max_broken=6 allows.")
    assert all(f"row {row} (line {row + 1}): " in message for row in range(1, 6))
    assert "row 6" not in message
    assert "and 2 more" in message
    assert error.value.__cause__.place.row == 7
    with pytest.raises(DataError, match="7 of 8"):  # it does not pass the second time
        data[1]


@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (2, 2), (0.0, 0), (0.25, 2), (0.24, 1), (1.0, 8), (100, 8)])
def test_limits(folder, limit, allowed):
    write(folder / "rows.jsonl", [GOOD, {"conversations": talk("Why?")}] * 4)
    data = dataset(folder, "rows.jsonl", max_broken=limit)
    met = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in (1, 3, 5, 7):
            try:
                data[row]
                met += 1
            except DataError:
                break
    assert met == min(allowed, 4)


@pytest.mark.parametrize("limit", [-1, 1.5, -0.1, True, "1", None, float("nan")])
def test_limits_that_cannot_work(folder, limit):
    with pytest.raises(ConfigError, match="max_broken"):
        dataset(folder, max_broken=limit)


def test_when_no_row_is_left(folder):
    write(folder / "rows.jsonl", [{"conversations": talk("Why?")}] * 3)
    data = dataset(folder, "rows.jsonl", max_broken=1.0)
    with (
        pytest.warns(UserWarning, match="Skipped a broken row"),
        pytest.raises(DataError, match="None of the 3 rows is usable"),
    ):
        data[0]


def test_check_reads_everything_and_replaces_nothing(folder):
    rows = [break_it(folder, kind)[0] for kind in ("missing image", "too few tags")]
    write(folder / "rows.jsonl", [GOOD, *rows, RECORDS[0]])
    data = dataset(folder, "rows.jsonl", max_broken=0)
    assert [entry.row for entry in data.check()] == [1, 2]
    assert [entry.row for entry in data.check([0, 2])] == [2]
    assert data.broken == ()


def test_repeated_rows_count_once(folder):
    data = internvl(folder, {"repeat_time": 3}, [RECORDS[1], {"conversations": talk("Why?")}], max_broken=1)
    with pytest.warns(UserWarning, match="Skipped a broken row") as seen:
        assert [data[row]["row"] for row in range(6)] == [0, 2, 2, 4, 4, 0]
    assert len(seen) == 1
    assert len(data.broken) == 1


# --------------------------------------------------------------------------- workers, pickles, open files


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_read_the_same_and_report_to_the_data_set(folder):
    row, _ = break_it(folder, "missing image")
    write(folder / "rows.jsonl", [*RECORDS, row, *RECORDS, row])
    data = dataset(folder, "rows.jsonl", max_broken=2)
    collate = Collator(0, image_shape=(3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apart = list(DataLoader(data, batch_size=3, num_workers=2, collate_fn=collate))
    assert [entry.row for entry in sorted(data.broken, key=lambda entry: entry.row)] == [5, 11]
    together = list(DataLoader(data, batch_size=3, collate_fn=collate))  # no warning: already reported
    assert len(apart) == len(together) == 4
    assert all(same(one, two) for one, two in zip(apart, together, strict=True))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_share_the_limit(folder):
    row, _ = break_it(folder, "missing image")
    write(folder / "rows.jsonl", [GOOD, row] * 4)
    data = dataset(folder, "rows.jsonl", max_broken=3)
    errors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = iter(DataLoader(data, batch_size=1, num_workers=2, collate_fn=_numbers))
        while True:  # to the end: after an error torch waits five seconds for each worker that was not
            try:
                next(batches)
            except StopIteration:
                break
            except DataError as error:
                errors.append(str(error))
    assert errors
    assert all("4 of 8 rows are broken" in error for error in errors)


def _numbers(samples):
    return [sample["row"] for sample in samples]


@pytest.mark.parametrize("store", ["folder", "shards"])
def test_a_pickle_reads_the_same(folder, store):
    names = ["coco/cat.jpg", "coco/cup.png", "vg/rocket.jpg"]
    images = TarImages(pack(folder, names)) if store == "shards" else folder / "images"
    rows = LlavaRows(folder / "llava.jsonl", images)
    data = ConversationDataset(rows, build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT)
    copy = pickle.loads(pickle.dumps(data))
    assert all(same(data[row], copy[row]) for row in range(5))


def test_the_log_is_shared_by_copies_and_goes_with_the_first(folder):
    write(folder / "rows.jsonl", [{"conversations": talk("Why?")}, GOOD])
    data = dataset(folder, "rows.jsonl", max_broken=1)
    path = data._log._path
    assert not path.exists()
    copy = pickle.loads(pickle.dumps(data))
    with pytest.warns(UserWarning, match="Skipped a broken row"):
        copy[0]
    assert len(data.broken) == 1
    del copy
    gc.collect()
    assert path.exists()
    del data
    gc.collect()
    assert not path.exists()


def test_a_forked_worker_leaves_the_log_to_its_owner(tmp_path):
    path = tmp_path / "log"
    path.touch()
    _remove(path, os.getpid() + 1)
    assert path.exists()
    _remove(path, os.getpid())
    assert not path.exists()


def test_no_file_stays_open(folder):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("lists open files by /proc")
    shards = TarImages(pack(folder, ["coco/cat.jpg", "coco/cup.png", "vg/rocket.jpg"]))
    data = ConversationDataset(
        LlavaRows(folder / "llava.json", shards), build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT
    )
    for row in range(5):
        data[row]
    handles = [str(handle.readlink()) for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
    assert not [handle for handle in handles if str(folder) in handle]


# -------------------------------------------------------------------------------------- lengths, settings


class Bare:
    """A source of one's own, with the four members that a source needs."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def place(self, index):
        return self.rows.place(index)

    def image(self, index, name):
        return self.rows.image(index, name)


def test_lengths(folder):
    data = dataset(folder)
    assert data.modality_lengths() == [7, -8, 7, 5, 8]
    bare = ConversationDataset(Bare(data.source), data.tokenizer, to_tensor(8), image_text=TEXT, tiling=PadToSquare())
    assert bare.modality_lengths() == data.modality_lengths()
    assert same(bare[3], data[3])
    repeated = internvl(folder, {"repeat_time": 2.5}, [RECORDS[1], RECORDS[0]])
    assert repeated.modality_lengths() == [-8, 7, -8, 7, -8]


def test_max_length_cuts_the_end(folder):
    whole, short = dataset(folder)[1], dataset(folder, max_length=80)[1]
    assert len(whole["input_ids"]) > 80
    assert torch.equal(short["input_ids"], whole["input_ids"][:80])
    assert torch.equal(short["labels"], whole["labels"][:80])


def test_empty_instructions_may_have_a_default(folder):
    write(folder / "rows.json", [{"image": "coco/cat.jpg", "conversations": talk("<image>", "A cat.")}])
    assert dataset(folder, "rows.json", empty_instruction="Describe it.")[0]["context_text"] == "Describe it."


def test_tags_and_tiles_must_match():
    messages = [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "<image>"}]
    expanded = ImageText("x", per_tile=2, before="(", after=")").expand(messages, [1, 3])
    assert [message["content"] for message in expanded] == ["(xx) or (xxxxxx)?", "<image>"]
    with pytest.raises(DataError, match="Too many"):
        TEXT.expand(messages, [1])
    with pytest.raises(DataError, match="Too few"):
        TEXT.expand(messages, [1, 1, 1])


def test_settings_that_cannot_work(folder):
    with pytest.raises(ConfigError, match="'<picture>' is not a token"):
        dataset(folder, image_text=ImageText("<picture>"))
    with pytest.raises(ConfigError, match="at least 1 token"):
        ImageText(per_tile=0)
    rows = LlavaRows(folder / "llava.json", folder / "images")
    with pytest.raises(ConfigError, match="no image_processor"):
        ConversationDataset(rows, build_tokenizer("vicuna"))[0]


def test_image_processors_that_do_not_fit(folder):
    def five(images, return_tensors):
        return {"pixel_values": torch.zeros(len(images), 2, 3, 8, 8)}

    five.preprocess = five
    rows = LlavaRows(folder / "llava.json", folder / "images")
    data = ConversationDataset(rows, build_tokenizer("vicuna"), five, image_text=TEXT)
    with pytest.raises(ShapeError, match="one tensor per image"):
        data[0]
    data = ConversationDataset(rows, build_tokenizer("vicuna"), as_it_is, image_text=TEXT)
    with pytest.raises(ShapeError, match="several sizes"):
        data[3]

    def refuses(picture):
        raise ValueError("too thin")

    data = ConversationDataset(rows, build_tokenizer("vicuna"), refuses, image_text=TEXT, max_broken=1)
    with pytest.warns(UserWarning, match="refuses an image: too thin"):
        assert data[0]["row"] == 1


def as_it_is(picture):
    return torch.from_numpy(np.array(picture))
