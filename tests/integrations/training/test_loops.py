"""Loops without a Trainer: what accelerate saves continues exactly, and the saved folder loads exactly."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.integrations import train_only, watch_movement
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.snapshots import aligned
from tests.helpers.training import QUESTIONS, TEXTS, build, same, state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]
PARTS = ["projector", "llm", "covft"]


def batches():
    torch.manual_seed(5)
    mllm = BY_NAME["llava"]
    model = mllm.build()
    made = [mllm.batch(model, [Row(1, QUESTIONS[i]), Row(1, QUESTIONS[(i + 1) % 4])]).inputs for i in range(4)]
    return [{**batch, "labels": batch["input_ids"]} for batch in made]


class Loop:
    """A plain accelerate loop over the batches, which can start at any of them."""

    def __init__(self, seed):
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        model = build(seed)
        train_only(model, PARTS)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self.model, self.optimizer = self.accelerator.prepare(model.train(), optimizer)
        self.watch = watch_movement(self.model, steps=4)

    def run(self, chosen):
        for batch in chosen:
            self.accelerator.backward(self.model(**batch).loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.watch.after_step()


def test_accelerate__a_resumed_loop_ends_as_one_that_was_not_interrupted(tmp_path):
    data = batches()
    whole = Loop(seed=0)
    whole.run(data[:2])
    whole.accelerator.save_state(str(tmp_path / "state"))
    middle = state(whole.model)
    whole.run(data[2:])
    resumed = Loop(seed=1)
    assert not same(state(resumed.model), middle)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert same(state(resumed.model), middle)
    resumed.run(data[2:])
    assert same(state(resumed.model), state(whole.model))
    assert not same(state(whole.model), middle)
    model = whole.accelerator.unwrap_model(whole.model).eval()
    model.save_pretrained(tmp_path / "final", state_dict=whole.accelerator.get_state_dict(whole.model))
    again, _ = covft.load_model(tmp_path / "final", TEXTS, processor=BY_NAME["llava"].tokenizer)
    assert same(state(again), state(model))
    with torch.no_grad():
        assert torch.equal(aligned(again)(**data[0]).logits, model(**data[0]).logits)
