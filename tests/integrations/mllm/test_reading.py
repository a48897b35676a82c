"""The instruction of the right row for every image."""

from __future__ import annotations

import inspect

import pytest
import torch

from covft.errors import (
    ShapeError,
)
from covft.integrations import attach, detach, get_encoder
from covft.integrations.mllm.families import base_of
from tests.helpers.attached import CUP, DOG, MIXED, PEOPLE, TEXTS, alone, attached, changed, every_mllm, forward
from tests.helpers.mllms import BY_NAME, Batch, Row
from tests.helpers.towers import image_features, perturb
from tests.helpers.watching import watch

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.sampled(2)
@every_mllm
def test_forward__every_image_has_the_question_of_its_row(mllm):
    model, batch = attached(mllm.name)
    _, runs = forward(model, batch)
    assert len(runs) == 1
    questions = [MIXED[row].question for row in batch.row_of_tile]
    wanted = alone(model, runs[0].images, questions)
    assert changed(runs[0].features, wanted) == [False] * len(questions)
    # With the questions of two rows exchanged, exactly their images change.
    others = alone(model, runs[0].images, [{CUP: PEOPLE, PEOPLE: CUP}[question] for question in questions])
    assert changed(runs[0].features, others) == [True] * len(questions)


@pytest.mark.sampled(2)
@every_mllm
def test_forward__asking_one_row_something_else_changes_its_images_only(mllm):
    rows = [Row(1, CUP), Row(2, PEOPLE), Row(1, CUP)]
    plain = mllm.build()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    batches = [mllm.batch(plain, [rows[0], Row(2, question), rows[2]]).inputs for question in (PEOPLE, DOG)]
    prompts = [{name: inputs[name] for name in names if name in inputs} for inputs in batches]
    model, batch = attached(mllm.name, rows)
    runs = [forward(model, batch, **prompt)[1][0] for prompt in prompts]
    assert runs[0].same_images(runs[1])
    assert changed(runs[0].features, runs[1].features) == [row == 1 for row in batch.row_of_tile]


def test_onevision__samples_of_several_images_are_not_tiled():
    model, _ = attached("llava_onevision", [Row(1, CUP)])
    base = base_of(model)
    pixels = torch.randn(3, 3, 3, 32, 32)
    sizes = torch.tensor([(30, 60), (30, 60), (60, 20)])
    given = {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": torch.tensor([1, 2])}
    with get_encoder(model).condition("any"):
        lengths = [len(f) for f in image_features(base.get_image_features(**given))]
    assert lengths[0] > lengths[1] == lengths[2]
    mllm = BY_NAME["llava_onevision"]
    texts = [mllm.prompt(Row(1, CUP), lengths[:1]), mllm.prompt(Row(2, PEOPLE), lengths[1:])]
    inputs = mllm.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        _, runs = watch(get_encoder(model).vit, lambda: model(**ids, **given))
    assert changed(runs[0].features, alone(model, runs[0].images, [CUP] * 3 + [PEOPLE] * 2)) == [False] * 5


def test_smolvlm__a_batch_without_images_keeps_one_of_zeros():
    model, _ = attached("smolvlm")
    zeros = torch.zeros(2, 1, 3, 32, 32)
    with torch.no_grad():
        _, runs = watch(
            get_encoder(model).vit, lambda: model.get_image_features(pixel_values=zeros, context_text=[CUP])
        )
    assert not any(changed(runs[0].features, alone(model, [{"pixel_values": zeros[0]}], [CUP])))
    assert len(runs[0].features) == 1


def test_forward__text_alone_needs_nothing():
    model, _ = attached("llava")
    mllm = BY_NAME["llava"]
    ids = mllm.tokenizer("no turn of anybody", return_tensors="pt", add_special_tokens=False)["input_ids"]
    _, runs = forward(model, Batch({"input_ids": ids}, []))
    assert runs == []
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **options).shape == (1, ids.shape[1] + 2)


def test_forward__of_the_model_without_its_head():
    mllm = BY_NAME["llava"]
    whole = mllm.build()
    batch = mllm.batch(whole, MIXED)
    model = base_of(whole)
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    with torch.no_grad():
        _, runs = watch(get_encoder(model).vit, lambda: model(**batch.inputs))
        assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP, PEOPLE, PEOPLE])))
    detach(model)


def test_videos__one_text_for_all_frames():
    model, _ = attached("llava_onevision", [Row(1, CUP)])
    mllm = BY_NAME["llava_onevision"]
    video = model.config.video_token_id
    frames = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad(), get_encoder(model).condition("any"):
        # Named, as release 4 of transformers needs them here.
        reads = {
            name: getattr(model.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")
        }
        length = len(image_features(model.get_video_features(frames, **reads))[0])
    # Releases up to 5.17, or later, add a newline to the features.
    length += "image_newline" in inspect.getsource(type(base_of(model)).forward)
    ids = torch.cat([torch.full((1, length), video), mllm_ids(mllm, CUP)], dim=1)
    with torch.no_grad():
        _, runs = watch(get_encoder(model).vit, lambda: model(ids, pixel_values_videos=frames))
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP, CUP])))
    with torch.no_grad():
        _, runs = watch(
            get_encoder(model).vit, lambda: model.get_video_features(frames, **reads, context_text="another?")
        )
    assert not any(changed(runs[0].features, alone(model, runs[0].images, ["another?"] * 2)))
    with pytest.raises(ShapeError, match="only one text"):
        model.get_video_features(frames, **reads, context_text=["one", "two"])
    other = mllm_ids(mllm, CUP[:-1] + "!")
    two = torch.cat([mllm_ids(mllm, CUP)[:, -other.shape[1] :], other])
    with pytest.raises(ShapeError, match="only one text"):
        model(two, pixel_values_videos=frames)


def mllm_ids(mllm, question):
    return mllm.tokenizer(mllm.prompt(Row(0, question), []), return_tensors="pt", add_special_tokens=False)["input_ids"]


def test_forward__rows_without_images_may_hold_anything():
    model, batch = attached("llava")
    ids = batch.inputs["input_ids"].clone()
    ids[1] = ids[1, -1]
    _, runs = forward(model, batch, input_ids=ids)
    assert changed(runs[0].features, alone(model, runs[0].images, [CUP, PEOPLE, PEOPLE])) == [False] * 3


@pytest.mark.parametrize("turns", ["all", "first", "last"])
def test_turns__all_first_last(turns):
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, [Row(1, CUP)])
    attach(model, TEXTS, tokenizer=mllm.tokenizer, turns=turns)
    perturb(get_encoder(model))
    more = mllm.tokenizer(f" a red ball</s> USER: {DOG} ASSISTANT:", return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([batch.inputs["input_ids"], more["input_ids"]], dim=1)
    _, runs = forward(model, batch, input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted = {"all": f"{CUP} {DOG}", "first": CUP, "last": DOG}[turns]
    assert changed(runs[0].features, alone(model, runs[0].images, [wanted])) == [False]


def test_turns__others_than_in_training_are_warned_about(tmp_path):
    mllm = BY_NAME["llava"]
    model = mllm.build()
    attach(model, TEXTS, tokenizer=mllm.tokenizer, turns="last", system="Be brief.")
    model.save_pretrained(tmp_path)
    saved = tmp_path / "covft"
    with pytest.warns(UserWarning, match=r"turns='last'; here it is turns='all'"):
        attach(
            type(model).from_pretrained(tmp_path), TEXTS, tokenizer=mllm.tokenizer, pretrained=saved, system="Be brief."
        )
    attach(  # the same: no warning, which would be an error here
        type(model).from_pretrained(tmp_path),
        TEXTS,
        tokenizer=mllm.tokenizer,
        pretrained=saved,
        turns="last",
        system="Be brief.",
    )
