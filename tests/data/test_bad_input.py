"""One bad row, picture or entry, of every kind: the row counts as broken and its neighbours are read."""

import json
import warnings

import pytest

from covft.data import (
    ConversationDataset,
    InternVLRows,
    JsonRecords,
    LlavaRows,
    MetaEntry,
    NoTiling,
    parse_row,
    read_meta,
)
from covft.errors import ConfigError, CoVFTError
from tests.helpers.data import TEXT, build_tokenizer, talk, to_tensor, write
from tests.helpers.memory import peak_bytes

GOOD = {"id": "good", "image": "coco/cat.jpg", "conversations": talk("<image>\nWho is it?", "A cat.")}
ASK, ANSWER = GOOD["conversations"]


def turns(*values):
    return {**GOOD, "conversations": list(values)}


def spoken(question="<image>\nWho?", answer="A cat."):
    return {**GOOD, "conversations": talk(question, answer)}


DEEP = "[" * 100_000 + "]" * 100_000
ODD = [None, True, 3, -0.5, "", "x", [], ["x"], {}, {"x": 1}, [None], [[]], [{}]]

# Raw lines of JSON, each of which is one bad row.
RAW = {
    "empty object": "{}",
    "not closed": '{"conversations": [',
    "a word": "{nothing}",
    "deep nesting": '{"conversations": ' + DEEP + "}",
    "deep nesting elsewhere": json.dumps(GOOD)[:-1] + ', "boxes": ' + DEEP + "}",
    "deep objects": '{"conversations": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
    "5000 digits": json.dumps(GOOD)[:-1] + ', "score": %s}' % ("9" * 5000),
    "5000 digits as an answer": '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": %s}]}'
    % ("1" * 5000),
    "infinite answer": '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": 1e999}]}',
    "NaN": '{"conversations": NaN}',
    "too large": json.dumps({**GOOD, "mask": "x" * (8 << 20)}),
}
# Records that JSON can hold.
RECORDS = {
    "surrogate in a question": spoken("<image>\nWho is \ud800?"),
    "surrogate in an answer": spoken(answer="A \udfff."),
    "surrogate in the name": {**GOOD, "image": "coco/\ud83d.jpg"},
    "NUL in a question": spoken("<image>\nWho\0?"),
    "NUL in an answer": spoken(answer="A\0cat."),
    "NUL in the name": {**GOOD, "image": "coco/cat.jpg\0.png"},
    "line break in the name": {**GOOD, "image": "coco/cat\n.jpg"},
    "long name": {**GOOD, "image": "x" * 100_000},
    "a folder": {**GOOD, "image": "coco"},
    "a parent": {**GOOD, "image": "../llava.json"},
    "not a picture": {**GOOD, "image": "page.html"},
    "cut picture": {**GOOD, "image": "cut.jpg"},
    "bomb": {**GOOD, "image": "bomb.png"},
    "strip": {**GOOD, "image": "strip.png"},
    "32-bit grey": {**GOOD, "image": "grey.tif"},
    "URL": {**GOOD, "image": "https://example.org/cat.jpg"},
    "data": {**GOOD, "image": "data:image/png;base64,AAAA"},
    "video": {**GOOD, "video": "a.mp4"},
    "videos": {**GOOD, "videos": ["a.mp4"]},
    "other spelling": spoken("<img>\nWho?"),
    "numbered tags": spoken("<image_1>\nWho?"),
    "two names": {**GOOD, "images": ["vg/rocket.jpg"]},
    "many images": {
        **GOOD,
        "image": ["coco/cat.jpg"] * 100_000,
        "conversations": talk("<image>" * 100_000, "Cats."),
    },
    "endless text": {"conversations": talk("Why? " * 300_000, "So.")},
    "part of a video": turns({"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, ANSWER),
    "part without type": turns({"role": "user", "content": [{"text": "Who?"}]}, ANSWER),
    "part of a number": turns({"role": "user", "content": [{"type": "text", "text": 3}]}, ANSWER),
    "part of a picture": turns({"role": "user", "content": [{"type": "image", "image": {"bytes": "AAAA"}}]}, ANSWER),
    "part of another name": turns({"role": "user", "content": [{"type": "image", "image": "x.jpg"}, ASK]}, ANSWER),
    "tool call": turns(ASK, {"role": "assistant", "content": None, "tool_calls": []}),
    "answer of blanks": spoken(answer=" \n"),
    "true as an answer": spoken(answer=True),
    **{f"record {value!r}": value for value in ODD if not isinstance(value, dict) or not value},
    **{f"conversations {value!r}": {**GOOD, "conversations": value} for value in ODD},
    **{f"turn {value!r}": turns(value, ANSWER) for value in ODD},
    **{f"role {value!r}": turns({"from": value, "value": "<image>\nWho?"}, ANSWER) for value in ODD},
    **{f"question {value!r}": turns({"from": "human", "value": value}, ANSWER) for value in ODD},
    **{f"answer {value!r}": spoken(answer=value) for value in ODD if value not in (3, -0.5, "x") or value is True},
    **{f"image {value!r}": {**GOOD, "image": value} for value in ODD},
    **{f"images {value!r}": {"conversations": GOOD["conversations"], "images": value} for value in ODD},
}
LINES = {**RAW, **{name: json.dumps(record) for name, record in RECORDS.items()}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder with good and bad pictures."""
    import numpy as np
    from PIL import Image

    from tests.helpers.data import encoded_photograph

    folder = tmp_path_factory.mktemp("pictures")
    (folder / "coco").mkdir()
    cat = encoded_photograph("chelsea", ".jpg")
    (folder / "coco/cat.jpg").write_bytes(cat)
    (folder / "cut.jpg").write_bytes(cat[: len(cat) // 2])
    (folder / "page.html").write_text("<html>404</html>")
    (folder / "bomb.png").write_bytes(
        bytes.fromhex("89504e470d0a1a0a0000000d494844520000ffff0000ffff08000000003c1a3fd9")
    )
    Image.new("RGB", (800, 1)).save(folder / "strip.png")
    Image.fromarray(np.ones((2, 2), np.float32)).save(folder / "grey.tif")
    return folder


def test_there_are_enough_kinds():
    assert len(LINES) >= 130
    assert len(META) >= 50


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_bad_row_is_counted_and_every_good_one_read(tmp_path, pictures, suffix):
    """All kinds in one file, with a good row before and after each; raw damage only where lines hold it."""
    names = [name for name in LINES if suffix == "jsonl" or name not in ("not closed", "a word", "too large")]
    names = [name for name in names if suffix == "json" or not name.startswith("record")]
    good = json.dumps(GOOD)
    lines = [good] + [line for name in names for line in (LINES[name], good)]
    path = tmp_path / f"rows.{suffix}"
    path.write_text("[" + ",\n".join(lines) + "]" if suffix == "json" else "\n".join(lines) + "\n")
    data = ConversationDataset(
        LlavaRows(path, pictures),
        build_tokenizer("vicuna"),
        to_tensor(8),
        image_text=TEXT,
        tiling=NoTiling(),
        max_length=200,
        max_broken=len(names),
    )
    assert len(data) == 2 * len(names) + 1
    broken = {entry.row: entry for entry in data.check(range(1, len(data), 2))}
    read = [name for number, name in enumerate(names) if 2 * number + 1 not in broken]
    assert read == []
    for entry in broken.values():
        assert len(entry.reason) < 2000
        assert entry.reason.isprintable()
    assert data.check(range(0, len(data), 2 * len(names) // 10)) == []
    assert len(data.modality_lengths()) == len(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert data[1]["row"] == 2
    assert data.broken == (broken[1],)


def test_bytes_that_are_not_text_break_their_own_row(tmp_path):
    good = json.dumps(GOOD, ensure_ascii=False).encode()
    bad = [
        good.replace(b"Who", byte)
        for byte in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", "Größe".encode("latin-1"))
    ]
    for name, content in [
        ("rows.json", b"[" + b", ".join([*bad, good]) + b"]"),
        ("rows.jsonl", b"\n".join([*bad, good])),
    ]:
        (tmp_path / name).write_bytes(content)
        rows = LlavaRows(tmp_path / name)
        assert len(rows) == 6
        assert rows[5].messages[0]["content"] == "<image>\nWho is it?"
        for row in range(5):
            with pytest.raises(CoVFTError, match=f"row {row}.*(not JSON|surrogates)"):
                rows[row]


def test_errors_name_what_was_found():
    for record, found in [
        (spoken("<img>\nWho?"), "The questions contain <img>."),
        (spoken("<|image_1|>\nWho <image 2>?"), r"contain <image 2>, <\|image_1\|>"),
        ({**GOOD, "videos": ["a"]}, "field 'videos'"),
        (turns(ASK, {"from": "gpt", "value": True}), r"Turn 1 .*True"),
        (turns({"role": "tool", "content": "x"}, ANSWER), r"Turn 0 .*'tool'"),
        (RECORDS["part of a video"], r"neither text nor an image: .*'video'"),
        (RECORDS["two names"], r"names images twice: image \('coco/cat.jpg',\), images \('vg/rocket.jpg',\)"),
    ]:
        with pytest.raises(CoVFTError, match=found):
            parse_row(record)


# ------------------------------------------------------------------------------------------ files of rows


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_replaced_by_one_of_the_same_size(tmp_path, name):
    """The rows swap places, or one of them changes: offsets still fit, or not; nothing stale is ever read."""
    import os

    path = write(tmp_path / name, [{"id": 1, "text": "one"}, {"id": 2, "text": "threes"}, {"id": 3, "text": "same"}])
    records, before = JsonRecords(path), path.stat()
    write(path, [{"id": 1, "text": "threes"}, {"id": 2, "text": "one"}, {"id": 3, "text": "same"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `rsync -t` and `tar` do
    assert path.stat().st_size == before.st_size
    for row in (0, 1):
        with pytest.raises(ConfigError, match=f"has changed since its records were located.*\n.*row {row}"):
            records[row]
    with pytest.raises(ConfigError, match="has changed"):
        list(records.scan())
    assert records[2] == {"id": 3, "text": "same"}  # the very row that was located
    assert [row["text"] for _, row in JsonRecords(path).scan()] == ["threes", "one", "same"]


def test_a_file_that_is_gone(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    rows = LlavaRows(path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"has changed since its records were located.*\n.*No such file"):
        rows[0]


def test_a_picture_that_is_deleted_between_indexing_and_reading(tmp_path, pictures):
    picture = tmp_path / "x.jpg"
    picture.write_bytes((pictures / "coco/cat.jpg").read_bytes())
    rows = LlavaRows(write(tmp_path / "r.jsonl", [{**GOOD, "image": "x.jpg"}, spoken()]), tmp_path)
    data = ConversationDataset(rows, build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT, max_broken=2)
    assert data[0]["row"] == 0
    picture.unlink()
    assert [entry.row for entry in data.check()] == [0, 1]


@pytest.mark.parametrize("content", ["[%s]", "%s\n"])
def test_a_row_takes_what_is_stated(tmp_path, content):
    """8 MiB of the most wasteful JSON: 320 MiB; one byte more is never parsed as a row."""
    body = '{"a":[' + "{}," * ((8 << 20) // 3 - 4) + "{}]}"
    path = tmp_path / "rows"
    path.write_text(content % body)
    held = []
    assert peak_bytes(lambda: held.append(JsonRecords(path))) < 320 << 20
    assert peak_bytes(lambda: held[0][0]) < 320 << 20


@pytest.mark.slow
@pytest.mark.parametrize("question", ["Why? ", "a b "])
def test_the_longest_text_takes_what_is_stated(tmp_path, question):
    """640 bytes per character; one character more is refused before it is tokenized."""
    count = (1 << 20) // len(question) - 1
    records = [{"conversations": talk(question * count, "So.")}, {"conversations": talk("x" * (1 << 20), "So.")}]
    rows = LlavaRows(write(tmp_path / "rows.jsonl", records))
    data = ConversationDataset(rows, build_tokenizer("vicuna"))
    assert peak_bytes(lambda: data[0]) < 640 << 20
    found = []
    assert peak_bytes(lambda: found.extend(data.check([1]))) < 16 << 20
    assert "1,048,579 characters, more than 1,048,576" in found[0].reason


@pytest.mark.slow
def test_a_meta_file_takes_what_is_stated(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text('{"a":[' + "{}," * ((16 << 20) // 3 - 8) + "{}]}")

    def read():
        with pytest.raises(CoVFTError, match="has no annotation"):
            read_meta(path)

    assert peak_bytes(read) < 512 << 20


def test_a_line_without_end_is_read_in_pieces(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(64 << 20)
        file.seek(0, 2)
        file.write(b'"}\n{"a": 1}\n')
    held = []
    assert peak_bytes(lambda: held.append(JsonRecords(path))) < 16 << 20
    assert len(held[0]) == 2
    assert held[0][1] == {"a": 1}
    with pytest.raises(CoVFTError, match=r"row 0 \(line 1\): The row has 67,108,867 bytes"):
        held[0][0]


def test_a_list_is_read_in_pieces(tmp_path):
    """Records across the ends of pieces, with characters of one to four bytes."""
    records = [{"n": n, "text": "aé火🚀"[n % 4] * (n * 7919 % 200_000)} for n in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    held = []
    assert peak_bytes(lambda: held.append(JsonRecords(path))) < 64 << 20
    assert [held[0][row] for row in range(60)] == records


# ------------------------------------------------------------------------------------------------- metas

WRONG = {
    "annotation": [None, True, 3, [], {}, "", "none.jsonl", "a\0b", ".", "https://example.org/a.jsonl"],
    "root": [None, True, 3, [], {}, "none", "a\0b", "rows.jsonl", "http://example.org"],
    "data_augment": [None, "False", "true", 0, 1, [], {}],
    "repeat_time": [None, True, "2", [], {}, 0, -1, -0.5, 1e300, 10**400, 1e-9, float("nan"), float("inf")],
    "length": [True, "3", 2.0, -1, [], {}, float("nan")],
    "max_dynamic_patch": [True, "6", 6.0, 0, -1, 10**9, [], {}],
}
META = [(field, value) for field, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("field", "value"), META)
def test_an_entry_of_a_meta_file(tmp_path, field, value):
    annotation = write(tmp_path / "rows.jsonl", [GOOD])
    entry = {"root": str(tmp_path), "annotation": str(annotation)}
    good = {**entry, "length": 1}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"fine": good, "wrong": {**entry, field: value}}))
    with pytest.raises(CoVFTError) as error:
        InternVLRows(path)
    assert "'wrong'" in str(error.value) or (field == "repeat_time" and value == 1e-9)
    assert str(path) in str(error.value) or (field == "repeat_time" and value == 1e-9)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'"x"', b"{}", b'{"a": 3}', b'{"a": null}', b'{"a": {}}', b"\xff\xfe{\0}\0",
     b'{"a": {"annotation": %s}}' % (b"9" * 5000), b'{"a": %s}' % DEEP.encode(), b'{"a": "\xff"}'],
)  # fmt: skip
def test_contents_of_a_meta_file(tmp_path, content):
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(CoVFTError, match=r"meta\.json"):
        read_meta(path)


def test_a_meta_file_that_is_too_large(tmp_path):
    with (tmp_path / "meta.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(CoVFTError, match="more than the limit of 16,777,216"):
        read_meta(tmp_path / "meta.json")


def test_repeats_that_are_allowed():
    assert MetaEntry("x", "x", repeat_time=10_000).count(3) == 30_000
