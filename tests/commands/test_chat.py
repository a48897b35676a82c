"""`covft chat`: a session in a terminal, with a folder that covft saved, in a fresh process without a network."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import covft
from covft.cli import main
from covft.commands.chat import open_picture, weights_table
from covft.data import DataError
from covft.errors import ConfigError
from tests.helpers.attached import TEXTS
from tests.helpers.towers import perturb
from tests.tiny.folders import build, picture

ROOT = Path(covft.__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """A saved model, and two pictures."""
    model, processor = build("llava")
    covft.attach(model, TEXTS, tokenizer=processor)
    perturb(covft.get_encoder(model))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for colour in ("red", "blue"):
        picture(colour).save(tmp_path / f"{colour} cup.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def in_terminal(folder, lines, *arguments):
    """What a terminal shows of a session, line by line."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "TERM": "xterm"}
    command = [sys.executable, "-m", "covft", "chat", "model", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, close_fds=True
    )
    os.close(theirs)
    shown = b""
    os.write(ours, ("\n".join(lines) + "\n").encode())
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        shown += part
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, error
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))
    return text.replace("\r", "").splitlines()


def letters(text):
    """What a terminal shows as it is."""
    return "".join(letter for letter in text if letter.isprintable() and not letter.isspace())


@pytest.mark.long
def test_a_session(folder):
    first, follow_up, other = "What colour is it?", "And is there a cup?", "Is it blue?"
    lines = [
        "/weights", first, "/weights", follow_up, "/image none.png", "/image broken.png", "/image http://a.b/c.png",
        "/nonsense", "/reset", "/weights", f"/image {(folder / 'blue cup.png').as_uri()}", other, "/quit",
    ]  # fmt: skip
    shown = in_terminal(folder, lines, "--image", "red cup.png", "--max-new-tokens", "5")
    text = "\n".join(shown)
    model, processor = covft.load_model(folder / "model")
    chat = covft.Chat(model, processor, max_new_tokens=5, do_sample=False)
    answers = [chat.ask(first, image=folder / "red cup.png")]
    weights = chat.routing()
    answers.append(chat.ask(follow_up))
    chat.reset()
    answers.append(chat.ask(other, image=folder / "blue cup.png"))
    for answer in answers:
        assert letters(answer or "(no answer)") in letters(text)
    assert text.count("Routing weights come with the first answer") == 2, "before the first question, and after /reset"
    rows = [line.split() for line in shown if re.match(r"\s*\d+\s+0\.\d{3}", line)]
    expected = [[str(layer), *(f"{w:.3f}" for w in row[0].tolist())] for layer, row in weights.items()]
    assert rows == expected
    for name in ("none.png", "broken.png"):
        assert any(name in line and "/image" not in line for line in shown)
    assert "covft chat reads files of this machine and fetches nothing" in text
    assert " is not a command. " in text
    assert "40 x 30 pixels" in text
    assert "Traceback" not in text
    assert "Expected" not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no/such/folder"], "The folder no/such/folder does not exist."),
        (
            ["x", "--image", "https://a.b/c.png"],
            "https://a.b/c.png is not opened: covft chat reads files of this machine",
        ),
        (["x", "--image", "none.png"], "none.png"),
        ([".", "--dtype", "float8"], "dtype=float8 is not known."),
        (["."], "has no adapted tower."),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["chat", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1


def test_a_folder_without_a_processor_says_so_before_weights_are_loaded(folder, capsys):
    saved = folder / "model"
    for name in ("processor_config.json", "preprocessor_config.json"):
        (saved / name).unlink(missing_ok=True)
    (saved / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(saved)])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert (
        f"needs the model's processor, which makes tensors of pictures. In Python, processor.save_pretrained('{saved}"
        in error
    )


def test_a_picture_is_a_path_or_a_file_url(tmp_path):
    path = tmp_path / "a cup.png"
    picture("red").save(path)
    for name in (str(path), f'"{path}"', path.as_uri(), f"file://localhost{path.as_uri().removeprefix('file://')}"):
        assert open_picture(name).size == (40, 30)
    for name in ("", "http://a.b/c.png", "file://elsewhere/cup.png", "ftp://a.b/c.png"):
        with pytest.raises(ConfigError):
            open_picture(name)
    for name in (str(tmp_path), str(tmp_path / "none.png")):
        with pytest.raises(DataError):
            open_picture(name)


def test_the_table_has_a_row_for_each_block_and_picture():
    weights = {3: torch.tensor([[0.25, 0.75], [0.5, 0.5]]), 4: torch.tensor([[1.0, 0.0], [0.125, 0.875]])}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(weights_table(weights))
    lines = [line.split() for line in console.export_text().splitlines() if "." in line]
    assert lines == [
        ["3", "0", "0.250", "0.750"], ["3", "1", "0.500", "0.500"],
        ["4", "0", "1.000", "0.000"], ["4", "1", "0.125", "0.875"],
    ]  # fmt: skip
    assert weights_table({}) is None
