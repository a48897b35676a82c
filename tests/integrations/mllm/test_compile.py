"""torch.compile of a complete attached model: the reading of prompts is not traced."""

from __future__ import annotations

import itertools

import pytest
import torch

from covft.integrations import attach, get_encoder
from covft.integrations.mllm.families import base_of, find_tower
from tests.helpers.attached import CUP, DOG, PEOPLE, TEXTS
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.towers import perturb

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
def test_compile__new_questions_compile_no_more_than_without_covft():
    from torch._dynamo.testing import CompileCounter

    mllm = BY_NAME["llava"]
    counts = []
    for with_covft in (False, True):
        model = mllm.build()
        batches = [mllm.batch(model, [Row(1, text)]).inputs for text in (CUP, PEOPLE, DOG)]
        if with_covft:
            attach(model, TEXTS, tokenizer=mllm.tokenizer)
        with torch.no_grad():
            wanted = [model(**batch).logits for batch in batches]
            torch.compiler.reset()
            counter = CompileCounter()
            compiled = torch.compile(model, backend=counter)
            for batch, logits in zip(batches, wanted, strict=True):
                torch.testing.assert_close(compiled(**batch).logits, logits, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    without, attached = counts
    assert attached <= without + 2


WORDS = "what is left of the cup and how many dogs are there near the red tree".split()
QUESTIONS = [" ".join(WORDS[: 2 + count]) + "?" for count in (3, 7, 0, 9, 1, 5, 2, 8, 4, 6)]


def graphs_of_each_call(mllm, part, *, with_covft):
    """How many graphs each of ten questions adds, about one picture and then about two of one size."""
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    model = mllm.build()
    batches = [mllm.batch(model, [Row(1, text)] * pictures).inputs for pictures in (1, 2) for text in QUESTIONS]
    if with_covft:
        attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[1, 2])
        perturb(get_encoder(model))
    compiled = find_tower(model)[0] if part == "tower" else base_of(model).language_model
    torch.compiler.reset()
    counter, counts = CompileCounter(), [0]
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in batches]
        compiled.compile(backend=counter)
        for batch, logits in zip(batches, wanted, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-3, atol=1e-4)
            counts.append(counter.frame_count)
    return [after - before for before, after in itertools.pairwise(counts)]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tower", "language model"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_compile__ten_questions_need_the_graphs_of_the_first(name, part, monkeypatch):
    monkeypatch.setattr("tests.helpers.mllms.GRIDS", [(4, 6)] * 2)  # both pictures have one size
    plain, attached = (graphs_of_each_call(BY_NAME[name], part, with_covft=on) for on in (False, True))
    assert attached[0] >= 1, "it is compiled"
    if part == "tower":
        assert not any(attached[1:10]), "a question is data"
        assert not any(attached[11:])
    else:
        assert attached == plain
