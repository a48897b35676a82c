"""The saved folder: written completely or not at all, and checked when read."""

import errno
import json
import os

import pytest
import torch

from covft.checkpoints.folder import read_config, read_folder, write_folder
from covft.errors import CheckpointError
from covft.utils import files as files_module

fcntl = pytest.importorskip("fcntl")
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


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_that_the_user_wants(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(tmp_path / "run")
        save(tmp_path / "run", 2.0)
    finally:
        os.umask(before)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in (tmp_path / "run").iterdir()}
    assert modes == dict.fromkeys((CONFIG, WEIGHTS, CARD), 0o666 & ~umask)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=r"file.run cannot be written to[^$]*NotADirectoryError"):
        save(tmp_path / "file" / "run")


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    foreign = tmp_path / ".covft-0123"  # perhaps of a writer that is alive
    foreign.mkdir()
    save(tmp_path, 1.0)
    save(tmp_path, 2.0)
    assert number_in(tmp_path) == 2
    assert leftovers(tmp_path) == {".covft-0123", ".covft.lock"}


def test_what_a_dead_save_left_is_removed(tmp_path):
    save(tmp_path)
    (tmp_path / ".covft-0123").mkdir()
    (tmp_path / ".covft-0123" / WEIGHTS).write_bytes(b"half")
    (tmp_path / ".covft.lock").touch()
    (tmp_path / "model-0123456789abcdef.safetensors").write_bytes(b"old")
    kept = {"model-00001-of-00002.safetensors", "model-x.safetensors"}
    for name in kept:
        (tmp_path / name).touch()
    assert number_in(tmp_path) == 1
    save(tmp_path, 2.0)
    assert number_in(tmp_path) == 2
    assert leftovers(tmp_path) == kept


@pytest.mark.parametrize("digest", ["../secret", "", None, 5, "A" * 64, "0" * 63])
def test_what_is_not_a_digest_is_refused_and_names_no_file(tmp_path, digest):
    save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["weights"]["sha256"] = digest
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is not the file that|is incomplete"):
        read_folder(tmp_path)


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
    assert "upgrade covft" in str(caught.value)


def test_entries_that_a_later_version_added_are_ignored(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "notes": "new"}))
    assert number_in(tmp_path) == 1
