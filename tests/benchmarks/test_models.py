"""The tables of `docs/models`."""

import json

import pytest

from benchmarks.models.checkpoints import CHECKPOINTS
from benchmarks.models.measure import measure
from benchmarks.models.page import PAGES, facts, index, read, written


def test_each_page_has_the_table_of_the_results():
    pages = sorted(PAGES.glob("*.md"))
    assert len(pages) > 10
    for page in pages:
        assert page.read_text(encoding="utf-8") == written(page, read()), "run python -m benchmarks.models"


def test_the_results_are_of_these_checkpoints():
    assert [(row["page"], row["names"]) for row in read()] == [(c.page, list(c.names)) for c in CHECKPOINTS]


def row(page):
    [first, *_] = [row for row in read() if row["page"] == page]
    return first


def test_llava_is_that_of_the_paper():
    """Twelve blocks, each with what the paper's equations need: see tests/test_docs.py, which counts them by block."""
    assert row("llava")["added"] == 421_097_520
    assert row("llava")["layers"] == list(range(11, 23))
    assert row("llava")["read"] == -2


@pytest.mark.parametrize("page", ["qwen2-vl", "qwen3-5"])
def test_parameters_are_those_of_the_equations(page):
    """Experts, the refinements of image and text, the attention without the text half of its keys, the gate."""
    found = row(page)
    width, text, experts = found["width"], 768, 4
    inner = {"qwen2-vl": 4 * 1280, "qwen3-5": 4304}[page]
    ffn = 2 * width * inner + inner + width

    def refined(size):
        return 4 * size * size + 3 * size + 2 * size  # two biased linears of inner width 2 * size, and a norm

    # Queries, keys of the image, values of image and text, output; biases of all but the keys.
    attention = text * text + text * width + text * (width + text) + text * text + 3 * text
    block = experts * ffn + refined(width) + refined(text) + attention + text * experts + experts
    assert found["added"] == len(found["layers"]) * (block - ffn)


def test_tables_say_what_is_read():
    assert "the output of block 22 (`hidden_states[-2]`)" in facts([row("llava")])
    assert "the output of block 39, and those of blocks 2, 6, 14, 22, 29" in facts([row("llama-3-2-vision")])
    assert "[llava-1.5-7b-hf](llava.md)" in index([row("llava")])


def test_a_page_without_a_place_for_its_table_is_an_error(tmp_path):
    (tmp_path / "llava.md").write_text("# LLaVA\n")
    with pytest.raises(ValueError, match="0 places"):
        written(tmp_path / "llava.md", read())


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.names[0].partition("/")[2])
def test_results_are_what_attach_does(checkpoint):
    [found] = [row for row in read() if row["names"] == list(checkpoint.names)]
    assert json.loads(json.dumps(measure(checkpoint))) == found
