"""Rows as they are published: LLaVA's keys, chat messages, typed parts, numbers, other spellings of the tag."""

import pytest

from covft.data import LlavaRows, instruction_text, parse_row
from covft.errors import CoVFTError
from tests.helpers.data import llava_dataset, talk, write

TALK = talk("<image>\nWhat is it?", "A cat.")
WANT = ({"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."})


def chat(content, answer="A cat."):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a", "conversations": TALK},
        {"image": ["a"], "conversations": TALK},
        {"images": ["a"], "conversations": TALK},
        {"image": None, "images": ["a"], "conversations": TALK},
        {"image": "", "images": ["a"], "conversations": TALK},
        {"image": [], "images": ["a"], "conversations": TALK},
        {"image": "a", "images": None, "conversations": TALK},
        {"image": "a", "images": ["a"], "conversations": TALK},
        {"image": "a", "conversations": TALK, "messages": None},
        {"image": "a", "conversations": None, "messages": chat("<image>\nWhat is it?")},
        {"images": ["a"], "messages": chat("<image>\nWhat is it?")},
        {"images": ["a"], "messages": chat([IMAGE, QUESTION])},
        {"images": ["a"], "messages": chat([IMAGE, QUESTION], [{"type": "text", "text": "A cat."}])},
        {"image": None, "messages": chat([{"type": "image", "image": "a"}, QUESTION])},
        {"messages": chat([{"type": "image", "path": "a", "text": None}, {**QUESTION, "image": None}])},
        {"messages": chat([{"type": "image_url", "image_url": {"url": "a"}}, QUESTION])},
        {"images": ["a"], "messages": chat([{"type": "image", "url": "a"}, QUESTION])},
        {"images": ["a"], "messages": chat([IMAGE, {"type": "text", "text": "\nWhat is it?"}])},
        {
            "images": ["a"],
            "messages": chat([IMAGE, {"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]),
        },
        {"image": "a", "conversations": talk("<Image>\nWhat is it?", "A cat.")},
        {"image": "a", "conversations": talk("<ImageHere>\nWhat is it?", "A cat.")},
        {"image": "a", "conversations": talk("<IMAGE>\nWhat is it?", "A cat.")},
    ],
)
@pytest.mark.parametrize("add_missing_tag", [True, False])
def test_forms_of_one_row(record, add_missing_tag):
    row = parse_row(record, add_missing_tag=add_missing_tag)
    assert row.messages == WANT
    assert row.images == ("a",)
    assert instruction_text(record) == "What is it?"


def test_parts_between_text():
    parts = [
        {"type": "text", "text": "Is "},
        IMAGE,
        {"type": "text", "text": " in "},
        IMAGE,
        {"type": "text", "text": "?"},
    ]
    row = parse_row({"images": ["a", "b"], "messages": chat(parts)})
    assert row.messages[0]["content"] == "Is <image> in <image>?"
    row = parse_row({"images": ["a", "b"], "messages": chat([IMAGE, IMAGE, QUESTION])})
    assert row.messages[0]["content"] == "<image><image>\nWhat is it?"


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (0, "0"), (-1, "-1"), (0.5, "0.5"), (10**30, "1" + "0" * 30)])
def test_answers_that_are_numbers(value, text):
    assert parse_row({"conversations": talk("How many?", value)}).messages[1]["content"] == text


def test_other_spellings_stay_text_where_they_are_text():
    asks = "What does <Image> mean in <image>?"
    assert parse_row({"image": "a", "conversations": talk(asks, "A tag.")}).messages[0]["content"] == asks
    asks = "What does <Image> mean?"
    assert parse_row({"conversations": talk(asks, "A tag.")}).messages[0]["content"] == asks
    answer = parse_row({"image": "a", "conversations": talk("<Image>?", "It is an <Image>.")}).messages[1]["content"]
    assert answer == "It is an <Image>."


def test_a_tag_is_not_added_beside_one_that_is_spelled_otherwise():
    with pytest.raises(CoVFTError, match=r"Too few <image> tags .*: 0 for 1 images. The questions contain <img>"):
        parse_row({"image": "a", "conversations": talk("<img>\nWhat?", "So.")}, add_missing_tag=True)


def test_images_that_are_named_twice_must_agree():
    record = {"images": ["b"], "messages": chat([{"type": "image", "image": "a"}, QUESTION])}
    with pytest.raises(CoVFTError, match=r"name other images: \('b',\), \['a'\]"):
        parse_row(record)
    with pytest.raises(CoVFTError, match="names images twice"):
        parse_row({"image": "a", "images": ["b"], "conversations": TALK})


def test_samples_of_chat_messages(folder):
    """The same samples as from LLaVA's form, and the same lengths."""
    forms = [
        {"image": "coco/cat.jpg", "conversations": talk("<image>\nWhat animal is it?", "A cat.")},
        {"images": ["coco/cat.jpg"], "messages": chat([IMAGE, {"type": "text", "text": "What animal is it?"}])},
    ]
    data = llava_dataset(folder, write(folder / "forms.jsonl", forms).name)
    assert data[0]["input_ids"].tolist() == data[1]["input_ids"].tolist()
    assert data[0]["context_text"] == data[1]["context_text"] == "What animal is it?"
    assert data.modality_lengths() == [7, 7]
    assert len(LlavaRows(folder / "forms.jsonl")) == 2
