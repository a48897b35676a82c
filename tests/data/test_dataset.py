"""Samples from complete folders, lengths and settings."""

import numpy as np
import pytest
import torch

from covft.data import (
    CHAT_TEMPLATES,
    Collator,
    ConversationDataset,
    DataError,
    DynamicTiling,
    ImageText,
    LlavaRows,
    PadToSquare,
    encode_conversation,
)
from covft.errors import ConfigError, ShapeError
from tests.helpers.data import (
    RECORDS,
    TEXT,
    build_tokenizer,
    internvl_dataset,
    llava_dataset,
    photograph,
    same,
    talk,
    to_tensor,
    write,
)


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_samples(folder, name):
    data, tokenizer = llava_dataset(folder, name), build_tokenizer("vicuna")
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
    assert llava_dataset(folder, turns="first")[1]["context_text"] == "Who wrote Faust?"
    assert llava_dataset(folder, turns="last")[1]["context_text"] == "When?"
    with pytest.raises(ConfigError, match="not known"):
        llava_dataset(folder, turns="some")


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
    data = llava_dataset(folder, images_only=True, chat_template=CHAT_TEMPLATES["plain"], end_of_turn="\n")
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


def test_tiles(folder):
    records = [RECORDS[2], RECORDS[3], RECORDS[1], {**RECORDS[2], "conversations": talk("What?", "Coffee.")}]
    data = internvl_dataset(folder, {}, records)
    assert [data[row]["num_tiles"] for row in range(4)] == [[7], [3, 3], [], [7]]
    assert [len(data[row]["pixel_values"]) for row in (0, 1, 3)] == [7, 6, 7]
    text = build_tokenizer("internlm_2").decode(data[1]["input_ids"])
    image = "<img>" + "<IMG_CONTEXT>" * 6 + "</img>"
    assert f"Is{image}in{image}?" in text.replace(" ", "")
    tiles = DynamicTiling(max_tiles=6, tile_size=8)(photograph("coffee"))
    assert torch.equal(data[0]["pixel_values"], torch.stack([to_tensor(8)(tile) for tile in tiles]))


def test_the_limit_of_a_data_set_comes_first(folder):
    data = internvl_dataset(folder, {"max_dynamic_patch": 2}, [RECORDS[2], RECORDS[3]])
    assert [data[row]["num_tiles"] for row in range(2)] == [[3], [1, 1]]


def test_augmentation(folder):
    plain = internvl_dataset(folder, {"data_augment": False}, [RECORDS[2]] * 3)
    want = plain[0]["pixel_values"]
    assert torch.equal(plain[1]["pixel_values"], want)
    augmented = internvl_dataset(folder, {"data_augment": True}, [RECORDS[2]] * 3)
    one = augmented[0]["pixel_values"]
    assert torch.equal(one, augmented[0]["pixel_values"])
    assert not torch.equal(one, want)
    assert (one - want).abs().mean() < 0.05
    others = [augmented[1], augmented[2], internvl_dataset(folder, {"data_augment": True}, [RECORDS[2]], seed=1)[0]]
    assert not all(torch.equal(one, other["pixel_values"]) for other in others)


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
    data = llava_dataset(folder)
    assert data.modality_lengths() == [7, -8, 7, 5, 8]
    bare = ConversationDataset(Bare(data.source), data.tokenizer, to_tensor(8), image_text=TEXT, tiling=PadToSquare())
    assert bare.modality_lengths() == data.modality_lengths()
    assert same(bare[3], data[3])
    repeated = internvl_dataset(folder, {"repeat_time": 2.5}, [RECORDS[1], RECORDS[0]])
    assert repeated.modality_lengths() == [-8, 7, -8, 7, -8]


def test_max_length_cuts_the_end(folder):
    whole, short = llava_dataset(folder)[1], llava_dataset(folder, max_length=80)[1]
    assert len(whole["input_ids"]) > 80
    assert torch.equal(short["input_ids"], whole["input_ids"][:80])
    assert torch.equal(short["labels"], whole["labels"][:80])


def test_empty_instructions_may_have_a_default(folder):
    write(folder / "rows.json", [{"image": "coco/cat.jpg", "conversations": talk("<image>", "A cat.")}])
    assert llava_dataset(folder, "rows.json", empty_instruction="Describe it.")[0]["context_text"] == "Describe it."


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
        llava_dataset(folder, image_text=ImageText("<picture>"))
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
