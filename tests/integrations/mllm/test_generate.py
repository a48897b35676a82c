"""generate() of attached models."""

from __future__ import annotations

import copy

import pytest
import torch

from covft.integrations import get_encoder
from tests.helpers.attached import CUP, DOG, MIXED, PEOPLE, alone, attached, changed, every_mllm
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.watching import watch

pytestmark = pytest.mark.usefixtures("quiet")
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}
REPEATS = {"greedy": 1, "beams": 3, "sampling": 2}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@every_mllm
def test_generate__reads_the_prompt_once_and_before_it_is_expanded(mllm, way):
    model, batch = attached(mllm.name)
    vit = get_encoder(model).vit
    options = {**WAYS[way], "max_new_tokens": 4, "min_new_tokens": 4}

    def answers(**given):
        torch.manual_seed(0)
        return watch(vit, lambda: model.generate(**batch.inputs, **options, **given))

    read, runs = answers()
    assert len(runs) == 1
    times = len(runs[0].images) // len(batch.row_of_tile)
    assert times in (1, REPEATS[way])  # in many releases the tower runs after the images are repeated
    rows = [[row] * times * batch.row_of_tile.count(row) for row in sorted(set(batch.row_of_tile))]
    questions = [MIXED[row].question for group in rows for row in group]
    assert not any(changed(runs[0].features, alone(model, runs[0].images, questions)))
    given, _ = answers(context_text=[CUP, DOG, PEOPLE])
    assert torch.equal(read, given)


def test_generate__in_training_mode_and_with_the_prompt_as_inputs():
    model, batch = attached("llava")
    rest = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    wanted = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    model.train()
    assert torch.equal(model.generate(batch.inputs["input_ids"], **rest, max_new_tokens=3, do_sample=False), wanted)


def test_generate__a_later_turn_keeps_the_features_of_the_first():
    model, batch = attached("llava", [Row(1, CUP)])
    mllm = BY_NAME["llava"]
    first = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = mllm.tokenizer(f" USER: {DOG} ASSISTANT:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([first.sequences, more], dim=1)
    vit = get_encoder(model).vit
    options = {"max_new_tokens": 3, "do_sample": False}
    cache = copy.deepcopy(first.past_key_values)
    later, runs = watch(vit, lambda: model.generate(ids, past_key_values=cache, **options))
    assert runs == []
    # The same as the whole conversation at once, with the instruction of the first turn.
    whole = model.generate(ids, pixel_values=batch.inputs["pixel_values"], context_text=CUP, **options)
    assert torch.equal(later, whole)
