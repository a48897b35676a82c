"""`covft diagnose`, from folders to the page."""

import json

import pytest

import covft
from covft.cli import main
from covft.testing import HashTextEncoder
from tests.helpers.mllm_configs import PATCH, SIZE
from tests.tiny.folders import build, picture


def llava():
    model, processor = build("llava")
    model.config.image_seq_length = (SIZE // PATCH) ** 2  # what its tower gives; the class's default is 576
    return model, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small LLaVA, and two kinds of questions about pictures."""
    folder = tmp_path_factory.mktemp("llava")
    model, processor = llava()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    records = []
    for number in range(20):
        colour = ("red", "green")[number % 2]
        picture(colour).save(folder / f"{number}.png")
        asked, said = (("What colour is it?", colour), (f"Where is thing {number}?", "on the left"))[number // 2 % 2]
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": said}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def run(folder, *more, model="model", template="vicuna_v1"):
    given = ["--data", str(folder / "train.json"), "--template", template, "--steps", "1", "--batch", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(folder / model), *given, "--rate", "1e-4", *more])
    return ended.value.code or 0


@pytest.mark.long
def test_the_page_and_the_numbers(folder, tmp_path, capsys):
    assert run(folder, "--output", str(tmp_path / "found.json")) == 0
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / "found.json").read_text())
    assert shown.startswith(saved["verdict"]["words"])
    assert saved["found"]
    assert sorted(saved["kinds"].values()) == [10, 10]
    assert any("What colour is it?" in kind for kind in saved["kinds"])


@pytest.mark.long
def test_an_attached_model_and_a_mixture_that_names_its_kinds(folder, tmp_path, capsys):
    model, processor = llava()
    covft.attach(model, HashTextEncoder(8), tokenizer=processor, layers=[1], experts=2)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    meta = {}
    records = json.loads((folder / "train.json").read_text())
    for name, own in (("colours", [r for r in records if r["id"] // 2 % 2 == 0]), ("places", records)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)) + "\n")
        meta[name] = {"root": str(folder), "annotation": str(tmp_path / f"{name}.jsonl"), "length": len(own)}
        meta[name] |= {"data_augment": False, "repeat_time": 1}
    (tmp_path / "train.json").write_text(json.dumps(meta))
    assert run(tmp_path, "--json", "--text-encoder", "hash:8") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"] == {"colours": 10, "places": 20}
    assert found["silhouette"] is None


def test_what_cannot_be_loaded_is_told(folder, capsys):
    assert run(folder, model="nothing") == 2
    assert "CheckpointError" in capsys.readouterr().err
    assert run(folder, template="nonsense") == 2
    assert "'nonsense' is not a known chat template" in capsys.readouterr().err
