"""The saved folder: written completely or not at all, and checked when read."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from covft.checkpoints.folder import read_config, read_folder, write_folder
from covft.errors import CheckpointError
from covft.utils import files as files_module

CONFIG, WEIGHTS, CARD = "covft_config.json", "model.safetensors", "README.md"


def save(path, number=1.0, card="# card"):
    tensors = {
        "a.weight": torch.full((3, 4), number),
        "a.bias": torch.full((2,), number, dtype=torch.bfloat16),
    }
    config = {"covft": {"experts": int(number)}, "base": {"source": None}, "text": {"source": None}}
    write_folder(path, tensors, config, card)
    return tensors, config


def number_in(path):
    """Return the number that a folder was saved with; its weights and its settings must agree."""
    tensors, config = read_folder(path)
    numbers = {float(t.float().unique()) for t in tensors.values()} | {float(config["covft"]["experts"])}
    assert len(numbers) == 1
    return numbers.pop()


def leftovers(path):
    return {entry.name for entry in path.iterdir()} - {CONFIG, WEIGHTS, CARD}


def test_what_was_written_is_read(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(4, 3).T,
        "c": torch.randn(5).to(torch.bfloat16),
        "d": torch.arange(3),
        "e": torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
    }
    config = {"covft": {"experts": 2}, "base": {"x": None}, "text": {"width": 8}, "extra": ["a"]}
    write_folder(tmp_path / "deep" / "run", tensors, config, "# a card")
    found, read = read_folder(tmp_path / "deep" / "run")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert {name: read[name] for name in config} == config
    assert read["format"] == 1
    assert (tmp_path / "deep" / "run" / CARD).read_text(encoding="utf-8") == "# a card"
    assert not leftovers(tmp_path / "deep" / "run")
    assert read_config(str(tmp_path / "deep" / "run")) == read


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / WEIGHTS).write_bytes(b"also mine")
    save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "sub" / WEIGHTS).read_bytes() == b"also mine"
    assert number_in(tmp_path) == 1


def test_an_edited_model_card_is_kept(tmp_path):
    save(tmp_path)
    (tmp_path / CARD).write_text("# my own words", encoding="utf-8")
    save(tmp_path, 2.0, card="# other")
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "# my own words"
    assert number_in(tmp_path) == 2


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(CheckpointError, match="is a file"):
        save(path)
    assert path.read_text() == "text"


class Crash(Exception):
    """Stands for a process that is killed."""


@contextlib.contextmanager
def crash_at(monkeypatch, place, call, *, torn=False):
    """Raise at the n-th call of a file operation; a torn one has done half its work by then."""
    calls = 0
    owner, name = {
        "replace": (Path, "replace"),
        "write_text": (Path, "write_text"),
        "save_file": (files_module, "save_file"),
        "fsync": (files_module.os, "fsync"),
    }[place]
    original = getattr(owner, name)

    def crashing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != call:
            return original(*args, **kwargs)
        if torn and place in ("save_file", "write_text"):
            original(*args, **kwargs)
            target = args[1] if place == "save_file" else args[0]
            target.write_bytes(target.read_bytes()[:-20])
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crashing)
        if torn:  # a killed process cleans nothing up
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        yield


POINTS = [("save_file", 1), ("write_text", 1), ("write_text", 2)]
POINTS += [(place, call) for place in ("replace", "fsync") for call in (1, 2, 3)]


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize(("place", "call"), POINTS)
def test_a_first_save_that_was_cut_short_is_not_a_save(tmp_path, monkeypatch, place, call, torn):
    with crash_at(monkeypatch, place, call, torn=torn), pytest.raises(Crash):
        save(tmp_path)
    with pytest.raises(CheckpointError, match="is not a saved covft encoder, or its saving was cut short"):
        read_folder(tmp_path)
    if not torn:
        assert not leftovers(tmp_path)
    save(tmp_path, 3.0)
    assert number_in(tmp_path) == 3


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize(("place", "call"), POINTS)
def test_a_later_save_that_was_cut_short_is_the_old_one_or_refused(tmp_path, monkeypatch, place, call, torn):
    save(tmp_path, 1.0)
    crashed = False
    with crash_at(monkeypatch, place, call, torn=torn):
        try:
            save(tmp_path, 2.0)
        except Crash:
            crashed = True
    if not crashed:  # the card is kept, so a later save writes one file less
        assert number_in(tmp_path) == 2
        assert call == {"write_text": 2}.get(place, 3)
        return
    try:
        left = number_in(tmp_path)
    except CheckpointError as error:
        left = str(error)
    assert left == 1 or "is not the file that covft_config.json was written for" in left
    save(tmp_path, 3.0)
    assert number_in(tmp_path) == 3


def test_weights_that_cannot_be_written_leave_the_old_save_intact(tmp_path, monkeypatch):
    save(tmp_path, 1.0)
    with crash_at(monkeypatch, "save_file", 1, torn=True), pytest.raises(Crash):
        save(tmp_path, 2.0)
    assert number_in(tmp_path) == 1


@pytest.mark.parametrize("kept", [0, 1, 7, 40, -1])
def test_truncated_weights_are_refused(tmp_path, kept):
    save(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cut short, damaged, or of another save"):
        read_folder(tmp_path)


def test_one_flipped_bit_is_refused(tmp_path):
    save(tmp_path)
    path = tmp_path / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        read_folder(tmp_path)


def test_weights_of_another_save_are_refused(tmp_path):
    save(tmp_path / "one", 1.0)
    save(tmp_path / "two", 2.0)
    (tmp_path / "one" / WEIGHTS).write_bytes((tmp_path / "two" / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="of another save"):
        read_folder(tmp_path / "one")


def test_a_file_that_is_not_safetensors_is_refused_even_with_its_digest(tmp_path):
    save(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not tensors")
    config = json.loads((tmp_path / CONFIG).read_text())
    config["weights"].update(bytes=11, sha256=files_module.file_sha256(tmp_path / WEIGHTS))
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_folder(tmp_path)


@pytest.mark.parametrize(("name", "problem"), [(WEIGHTS, "has no weights"), (CONFIG, "is not a saved covft encoder")])
def test_a_missing_file_is_named_and_the_others_are_listed(tmp_path, name, problem):
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_folder(tmp_path)
    assert name in caught.value.expected
    assert CARD in caught.value.got


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="Got:      no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="Got:      an empty folder"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "is damaged"),
        (b'{"format": 1, "covft"', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[]", "is incomplete"),
        (b"null", "is incomplete"),
        (b"{}", "without format, covft, base, text, weights"),
        (b'{"format": 1, "covft": {}, "text": {}, "weights": {}}', "without base"),
        (b'{"format": 1, "covft": {}, "base": {}, "text": {}, "weights": null}', "incomplete|damaged"),
        (b'{"format": 1, "covft": {}, "base": {}, "text": {}, "weights": {}}', "incomplete|damaged"),
        (b'{"format": 1, "covft": [], "base": {}, "text": {}, "weights": {}}', "incomplete|damaged"),
        (b'{"format": "x", "covft": {}, "base": {}, "text": {}, "weights": {}}', "incomplete|damaged"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, text, problem):
    save(tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    with pytest.raises(CheckpointError, match=problem):
        read_folder(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "format": 2}))
    with pytest.raises(CheckpointError, match="a later version of covft") as caught:
        read_folder(tmp_path)
    assert "pip install --upgrade covft" in str(caught.value)


def test_entries_that_a_later_version_added_are_ignored(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "notes": "new"}))
    assert number_in(tmp_path) == 1
