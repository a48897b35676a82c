"""Rows of image and question, without answers."""

import json

import pytest
from PIL import Image

from covft.data import DataError, LlavaRows, QuestionRows, open_rows

ROWS = [
    {"id": 7, "image": "cup.png", "question": "What is it?"},
    {"image": ["cup.png", "cup.png"], "question": "Are they the same?"},
    {"question": "What is a cup?"},
    {"image": "cup.png"},
    {"image": "cup.png", "question": "<image> what?"},
    {"image": 3, "question": "What is it?"},
    {"image": "none.png", "question": "What is it?"},
]


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (4, 3), (200, 30, 30)).save(tmp_path / "cup.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return open_rows(tmp_path / "rows.jsonl", tmp_path)


def test_the_message_is_the_images_and_the_question(rows):
    assert type(rows) is QuestionRows
    assert [rows[i].messages[0]["content"] for i in range(3)] == [
        "<image>\nWhat is it?",
        "<image>\n<image>\nAre they the same?",
        "What is a cup?",
    ]
    assert (rows[0].id, rows[1].images, rows[2].images) == ("7", ("cup.png", "cup.png"), ())
    assert rows.image(0, "cup.png").size == (4, 3)


@pytest.mark.parametrize(("row", "reason"), [(3, "no question"), (4, "contains <image>"), (5, "neither a name")])
def test_a_broken_row_says_where_it_is(rows, row, reason):
    with pytest.raises(DataError, match=rf"rows\.jsonl, row {row} \(line {row + 1}\): .*{reason}"):
        rows[row]


def test_a_question_inside_a_conversation_is_not_a_row_of_questions(tmp_path):
    row = {"question": 1, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert type(open_rows(tmp_path / "rows.json")) is LlavaRows
