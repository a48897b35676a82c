"""A batch of the collator, as it is: the row of every tile, and dummies that leave no trace but their graph."""

from __future__ import annotations

import pytest
import torch

from covft.errors import ShapeError
from covft.integrations import get_encoder
from covft.integrations.mllm.attachment import image_id
from covft.integrations.mllm.families import base_of
from tests.helpers.attached import CUP, DOG, PEOPLE, attached
from tests.helpers.mllms import MLLMS, Row
from tests.helpers.watching import watch

pytestmark = pytest.mark.usefixtures("quiet")

# Models whose `pixel_values` are a plain batch of tiles, as the collator makes it.
PLAIN = [mllm for mllm in MLLMS if mllm.layout == "plain"]
every_plain = pytest.mark.parametrize("mllm", PLAIN, ids=str)


def with_dummies(inputs, flags, rows):
    """The batch with tiles of zeros where `flags` are 0."""
    real = iter(inputs["pixel_values"])
    shape = inputs["pixel_values"].shape[1:]
    tiles = [next(real) if flag else torch.zeros(shape) for flag in flags]
    return {
        **inputs,
        "pixel_values": torch.stack(tiles),
        "image_flags": torch.tensor(flags),
        "context_index": torch.tensor(rows),
        "num_tiles": [[] for _ in inputs["input_ids"]],
    }


@every_plain
def test_dummies__change_nothing(mllm):
    model, made = attached(mllm.name, [Row(0, DOG), Row(2, CUP), Row(0, PEOPLE)])
    inputs = made.inputs
    with torch.no_grad():
        without = model(**inputs).logits
        batch = with_dummies(inputs, [0, 1, 1, 0], [0, 1, 1, 2])
        output, (run,) = watch(get_encoder(model).vit, lambda: model(**batch))
    assert len(run.images) == 4
    assert torch.allclose(output.logits, without, rtol=1e-4, atol=1e-5)
    # The texts come from the rows that the batch names, or from the batch itself.
    with torch.no_grad():
        given = model(**batch, context_text=["anything", CUP, "anything else"]).logits
        other = model(**batch, context_text=["anything", PEOPLE, "anything else"]).logits
    assert torch.allclose(given, without, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[1], without[1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(other[[0, 2]], without[[0, 2]], rtol=1e-4, atol=1e-5)


@every_plain
def test_dummies__alone_give_every_parameter_of_the_tower_a_gradient_of_zeros(mllm):
    model, made = attached(mllm.name, [Row(1, DOG), Row(1, CUP)])
    inputs = made.inputs
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tokens["input_ids"] = tokens["input_ids"].masked_fill(tokens["input_ids"] == image_id(model), 5)
    tokens["labels"] = tokens["input_ids"]
    alone = model(**tokens).loss
    alone.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dummies = with_dummies({**tokens, "pixel_values": inputs["pixel_values"]}, [0, 0], [0, 1])
    loss = model(**dummies).loss
    loss.backward()
    assert torch.equal(loss, alone)
    tower = get_encoder(model)
    assert all(p.grad is not None for p in tower.trainable_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, expected.get(name, torch.zeros_like(parameter)))
    assert "get_image_features" not in vars(base_of(model))


def test_dummies__flags_that_do_not_fit_are_refused():
    model, made = attached("llava", [Row(1, DOG), Row(1, CUP)])
    inputs = made.inputs
    batch = with_dummies(inputs, [1, 1, 0], [0, 1, 1])
    with pytest.raises(ShapeError, match="image_flags does not fit"):
        model(**{**batch, "image_flags": torch.tensor([1, 0])})
    assert "get_image_features" not in vars(model.model)
    with pytest.raises(ShapeError, match="points at texts that are not there"):
        model(**batch, context_text=[DOG])
