"""The instructions of a data set, and the command that encodes them beforehand."""

from __future__ import annotations

import json

import pytest
import torch

from covft.cli import main
from covft.data import InternVLRows, LlavaRows, instructions_of, open_rows
from covft.data.broken import DataError
from covft.testing import HashTextEncoder
from covft.text import FeatureTable


def turns(*questions):
    return [turn for q in questions for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": "yes"})]


ROWS = [
    {"image": "a.jpg", "conversations": turns("<image>\nwhat is left?", "and right?")},
    {"conversations": turns("who wrote it?")},
    {"image": "missing.jpg", "conversations": turns("<image>\nwhat is left?")},
    {"image": "b.jpg", "conversations": turns("<image>")},
    {"conversations": [{"from": "nobody", "value": "?"}]},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the meta file's paths are those of where the process runs
    (tmp_path / "train.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[:2])))
    meta = {"demo": {"root": ".", "annotation": "rows.jsonl", "data_augment": False, "repeat_time": 2, "length": 2}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def test_questions__of_every_row_that_has_one(folder):
    rows = open_rows(folder / "train.json")
    assert isinstance(rows, LlavaRows)
    found = list(instructions_of(rows))
    assert found == ["what is left? and right?", "who wrote it?", "what is left?", None, None]
    assert list(instructions_of(rows, "last", empty_instruction="describe it")) == [
        "and right?", "who wrote it?", "what is left?", "describe it", None,
    ]  # fmt: skip


def test_questions__of_a_mixture_and_of_lines(folder):
    rows = open_rows(folder / "meta.json")
    assert isinstance(rows, InternVLRows)
    assert list(instructions_of(rows, "first")) == ["what is left?", "who wrote it?"] * 2
    assert isinstance(open_rows(folder / "rows.jsonl"), LlavaRows)
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(folder / "nothing.json")


def test_precompute__writes_a_table_of_distinct_texts(folder, capsys):
    out = folder / "texts.safetensors"
    arguments = ["precompute", str(folder / "train.json"), str(out), "--text-encoder", "hash:16"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert "3 distinct instructions of 5 rows, 16 numbers each" in shown.out
    assert "2 rows have none" in shown.err
    texts = ["what is left? and right?", "who wrote it?", "what is left?"]
    assert torch.equal(FeatureTable.load(out).encode(texts), HashTextEncoder(16).encode(texts))
