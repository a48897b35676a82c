"""Tokenizers and a LLaVA folder for the tests of training data."""

from pathlib import Path

import pytest

from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.data import RECORDS, build_tokenizer, encoded_photograph, write


@pytest.fixture(params=list(TEMPLATES))
def model(request):
    """The name of each template with its tokenizer."""
    return request.param, build_tokenizer(request.param)


@pytest.fixture
def vicuna():
    return build_tokenizer("vicuna")


@pytest.fixture
def qwen():
    return build_tokenizer("qwen_2")


@pytest.fixture
def folder(tmp_path):
    """A LLaVA folder: llava.json, llava.jsonl and images/."""
    images = tmp_path / "images"
    for path, name in [("coco/cat.jpg", "chelsea"), ("coco/cup.png", "coffee"), ("vg/rocket.jpg", "rocket")]:
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        (images / path).write_bytes(encoded_photograph(name, Path(path).suffix))
    write(tmp_path / "llava.json", RECORDS)
    write(tmp_path / "llava.jsonl", RECORDS)
    return tmp_path
