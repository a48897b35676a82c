"""covft.merge of attached multimodal LLMs: a plain model, and how far its answers move."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.errors import MergeError
from covft.integrations import get_encoder
from covft.integrations.mllm.attachment import attachment_of
from tests.helpers.attached import MIXED, attached
from tests.helpers.mllms import MLLMS

pytestmark = pytest.mark.usefixtures("quiet")
QUICK = ("llava", "qwen2_5_vl")
every_mllm = pytest.mark.parametrize(
    "name", [pytest.param(mllm.name, marks=() if mllm.name in QUICK else pytest.mark.long) for mllm in MLLMS]
)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@every_mllm
def test_the_model_is_plain_and_the_report_says_how_far_its_answers_move(name):
    model, batch = attached(name, experts=2)
    with torch.no_grad():
        for slot in get_encoder(model).slots().values():
            slot.router.gate.bias.copy_(torch.tensor([1.0, -1.0]))
    inputs = {key: value for key, value in batch.inputs.items() if key != "labels"}
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100  # the last four words of each row are its answer
    labels[inputs["attention_mask"] == 0] = -100
    before = logits_of(model, inputs)
    merged, report = covft.merge(model, [{**inputs, "labels": labels, "kind": ["a", "b", "a"]}])
    assert merged is model
    assert attachment_of(model) is None
    assert not any("covft" in type(module).__module__ for module in model.modules())
    after = logits_of(model, inputs)
    same, divergence, words = [], 0.0, 0
    for row, mark in enumerate(MIXED):
        if mark.images:
            places = (labels[row, 1:] != -100).nonzero()[:, 0]
            one, other = before[row, places].double(), after[row, places].double()
            same.append(bool((one.argmax(-1) == other.argmax(-1)).all()))
            p, q = one.softmax(-1), other.softmax(-1)
            divergence += (p * (p / q).log()).sum().item()
            words += len(places)
    assert report.total.samples == 2
    assert {kind: shift.samples for kind, shift in report.kinds.items()} == {"a": 2}  # the other has no image
    assert report.total.same_answers == pytest.approx(sum(same) / len(same))
    assert report.total.divergence == pytest.approx(divergence / words, rel=1e-3, abs=1e-7)
    assert 0 < report.total.features < report.total.tuning


def test_without_labels_the_next_word_counts_and_pictures_alone_have_no_answers():
    model, batch = attached("llava")
    before = logits_of(model, batch.inputs)
    _, report = covft.merge(model, [batch.inputs], distill=1)
    after = logits_of(model, batch.inputs)
    last = batch.inputs["attention_mask"].shape[1] - 1
    ends = [int(row.nonzero().max()) for row in batch.inputs["attention_mask"]]
    assert last in ends
    same = [bool(before[row, ends[row]].argmax() == after[row, ends[row]].argmax()) for row in (0, 2)]
    assert report.total.same_answers == pytest.approx(sum(same) / 2)
    assert report.undistilled is not None
    model, batch = attached("llava")
    _, report = covft.merge(model, [(batch.inputs["pixel_values"], ["a cup?", "a dog?", "a cat?"])])
    assert report.total.samples == 3
    assert report.total.same_answers is None


def test_another_library_that_has_replaced_a_method_is_named():
    model, batch = attached("llava")
    with pytest.raises(MergeError, match="cannot be merged"):
        covft.merge(model)
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(covft.errors.UnsupportedViTError, match=r"replaced model.forward since attach\(\)"):
        covft.merge(model, [batch.inputs])
