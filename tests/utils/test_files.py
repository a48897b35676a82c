"""Files that are written completely or not at all."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from covft.errors import CheckpointError
from covft.utils.files import (
    Pair,
    file_sha256,
    is_temporary,
    read_pair,
    read_tensors,
    write_json,
    write_pair,
    write_tensors,
    write_text,
)

PAIR = Pair("trained.safetensors", "trained.json")


def names(folder):
    return [entry.name for entry in folder.iterdir()]


def tensors(number):
    return {"a": torch.full((3, 2), number)}


def read(folder):
    def index():
        content = json.loads((folder / PAIR.index).read_text())
        return content, content

    found, content = read_pair(folder, PAIR, index)
    assert found["a"].unique().tolist() == [content["number"]]
    return content["number"]


def write(folder, number):
    write_pair(folder, PAIR, tensors(number), lambda stated: {"number": number, **stated})


WRITERS = {
    "text": lambda path, number: write_text(path, f"number {number} ä\n"),
    "json": lambda path, number: write_json(path, {"number": number}),
    "tensors": lambda path, number: write_tensors(path, tensors(number), {"about": "numbers"}),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("broken", ["fsync", "replace", "mkdir"])
def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch, kind, broken):
    path = tmp_path / "new" / "file"
    WRITERS[kind](path, 1.0)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        with pytest.raises(CheckpointError, match=r"new cannot be written to[^$]*No space left"):
            WRITERS[kind](path, 2.0)
    assert path.read_bytes() == before
    assert names(path.parent) == ["file"]
    WRITERS[kind](path, 2.0)
    assert path.read_bytes() != before
    assert names(path.parent) == ["file"]


def test_what_was_written_is_read(tmp_path):
    WRITERS["text"](tmp_path / "text", 1)
    assert (tmp_path / "text").read_bytes() == "number 1 ä\n".encode()
    WRITERS["json"](tmp_path / "json", 1)
    assert json.loads((tmp_path / "json").read_text()) == {"number": 1}
    stated = write_tensors(tmp_path / "weights", tensors(1.0))
    path = tmp_path / "weights"
    assert stated == {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    assert torch.equal(read_tensors(path, stated, "json")["a"], load_file(path)["a"])


def test_weights_that_are_replaced_while_they_are_read_are_those_of_one_save(tmp_path, monkeypatch):
    """The reader has the digest of the first save when the second one comes in."""
    from covft.utils import files

    write(tmp_path, 1.0)
    load, saves = files.load_file, iter([2.0, 3.0])

    def loading(path):
        number = next(saves, None)
        if number is not None:
            write(tmp_path, number)
        return load(path)

    monkeypatch.setattr(files, "load_file", loading)
    assert read(tmp_path) == 3


def test_threads_that_write_one_file(tmp_path):
    path = tmp_path / "table.safetensors"
    with ThreadPoolExecutor(3) as pool:
        for result in [pool.submit(write_tensors, path, tensors(float(number))) for number in range(30)]:
            result.result()
    assert load_file(path)["a"].unique().item() in range(30)
    assert names(tmp_path) == [path.name]


def test_a_pipe_is_not_read(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    write(tmp_path, 1.0)
    (tmp_path / PAIR.weights).unlink()
    os.mkfifo(tmp_path / PAIR.weights)
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path)


def test_damaged_weights_are_refused_and_missing_ones_named(tmp_path):
    write(tmp_path, 1.0)
    path = tmp_path / PAIR.weights
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="sha256"):
        read(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "temporary"),
    [(".covft.lock", True), (".covft-12/x", True), ("covft/.covft-12/x", True), ("covft/x", False), (".x", False)],
)
def test_temporary_files_are_known_by_their_names(name, temporary):
    assert is_temporary(Path(name)) is temporary
