"""torch.compile of a complete attached model: the reading of prompts is not traced."""

from __future__ import annotations

import pytest
import torch

from covft.integrations import attach
from tests.helpers.attached import CUP, DOG, PEOPLE, TEXTS
from tests.helpers.mllms import BY_NAME, Row

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
