"""Annotation files: every record is found where it is, and nothing is held open or in memory."""

import json
import pickle
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covft.data import DataError, JsonRecords
from covft.errors import ConfigError
from tests.helpers.data import RECORDS, write

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=6), values, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(objects, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 0, 3]), st.booleans())
def test_a_list_of_any_layout(tmp_path_factory, records, ascii_only, indent, bom):
    text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    path = tmp_path_factory.mktemp("records") / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" * bom + f"\n {text}\r\n".encode("utf-8", "surrogatepass"))
    read = JsonRecords(path)
    assert [read[row] for row in range(len(read))] == records
    assert list(read.scan()) == list(enumerate(records))


@settings(max_examples=60, deadline=None)
@given(st.lists(objects, min_size=1, max_size=6), st.data())
def test_lines_with_blank_ones_between(tmp_path_factory, records, data):
    lines = []
    for record in records:
        lines += [""] * data.draw(st.integers(0, 2)) + [json.dumps(record, ensure_ascii=False)]
    newline = data.draw(st.sampled_from(["\n", "\r\n"]))
    path = tmp_path_factory.mktemp("records") / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * data.draw(st.booleans()) + newline.join(lines).encode())
    if path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip().startswith(b"[") or not lines[0].strip("{"):
        return
    read = JsonRecords(path)
    assert [read[row] for row in range(len(read))] == records
    for row in range(len(read)):
        assert json.loads(lines[read.place(row).line - 1]) == records[row]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_pickle_is_small_and_reads(tmp_path, name):
    path = write(tmp_path / name, [{"text": "x" * 10_000, "number": number} for number in range(20)])
    data = pickle.dumps(JsonRecords(path))
    assert len(data) < 2_000
    assert pickle.loads(data)[7]["number"] == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="lists open files by /proc")
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_no_file_stays_open(tmp_path, name):
    from pathlib import Path

    read = JsonRecords(write(tmp_path / name, RECORDS))
    assert read[3] == RECORDS[3]
    next(iter(read.scan()))
    handles = [handle.readlink() for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
    assert read.path not in handles


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n{"a": "\xff"}\n{"a": 4}\n')
    read = JsonRecords(path)
    assert len(read) == 4
    assert read[3] == {"a": 4}
    with pytest.raises(DataError, match=re.escape(f"{path}, row 1 (line 3): The row is not JSON")):
        read[1]
    with pytest.raises(DataError, match=r"row 2 \(line 4\)"):
        read[2]
    assert [row for row, _ in read.scan()] == [0, 3]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "an empty file"),
        (b" \n ", "an empty file"),
        (b"hello", "starts with b'hello'"),
        (b'{\n  "set": {"root": ""}\n}', "JSONL"),
        (b"[]", "has no rows"),
        (b'[{"a": 1}, {"a": 2}', "2 complete records before it"),
        (b'[{"a": 1}, {"a"', "1 complete records before it"),
        (b'[{"a": 1} {"a": 2}]', "not a JSON list"),
        (b'[{"a": 1},]', "not a JSON list"),
        (b'[{"a": 1}]]', "Extra data"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, content, why):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=why):
        JsonRecords(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        JsonRecords(tmp_path / "none.json")


def test_a_file_that_has_changed(tmp_path):
    path = write(tmp_path / "rows.json", RECORDS)
    read = JsonRecords(path)
    write(path, RECORDS[1:])
    with pytest.raises(ConfigError, match="has changed"):
        read[0]
