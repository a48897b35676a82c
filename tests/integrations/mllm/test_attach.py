"""Multimodal LLMs with a context-aware tower: the right text for every image, and nothing else changed."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import covft
from covft.errors import (
    CheckpointError,
    ConfigError,
    MissingContextError,
    ShapeError,
    TextEncoderError,
    UnsupportedViTError,
)
from covft.integrations import attach, detach, get_encoder
from tests.helpers.mllms import BY_NAME, MLLMS, Batch, Row, watch
from tests.helpers.towers import perturb

TEXTS = covft.testing.HashTextEncoder(16)
CUP, PEOPLE, DOG = "what is left of the cup?", "how many people are there?", "a dog, and where?"
MIXED = [Row(1, CUP), Row(0, DOG), Row(2, PEOPLE)]
every_mllm = pytest.mark.parametrize("mllm", MLLMS, ids=str)


@pytest.fixture(autouse=True)
def _quiet():
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def attached(name, rows=MIXED, **settings):
    """An attached model whose text matters, and a batch."""
    mllm = BY_NAME[name]
    model = mllm.build()
    batch = mllm.batch(model, rows)
    attach(model, TEXTS, tokenizer=mllm.tokenizer, **settings)
    perturb(get_encoder(model))
    return model, batch


def forward(model, batch, **changes):
    """Logits, and the runs of the tower."""
    with torch.no_grad():
        output, runs = watch(get_encoder(model).vit, lambda: model(**{**batch.inputs, **changes}))
    return output.logits, runs


def alone(model, images, texts):
    """What the tower makes of each image by itself, the text given by hand."""
    encoder = get_encoder(model)
    with torch.no_grad():
        found = [encoder(**image, text=[text]).last_hidden_state for image, text in zip(images, texts, strict=True)]
    return [tokens[0] if tokens.dim() == 3 else tokens for tokens in found]


def changed(one, other):
    """Which rows of two tensors differ by more than rounding."""
    return [not torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(one, other, strict=True)]


# The start and the end.


@every_mllm
def test_attach__changes_no_logit_at_the_start(mllm):
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    before = model(**batch.inputs).logits
    assert attach(model, TEXTS, tokenizer=mllm.tokenizer) is model
    after = model(**batch.inputs).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    # Images matter to the logits, or the comparison says nothing about them.
    other = model(**{**batch.inputs, "pixel_values": batch.inputs["pixel_values"].flip(-1)}).logits
    assert (other - before).abs().max() > 1e-3 * before.abs().max()


@every_mllm
def test_attach__leaves_out_what_the_model_does_not_read_and_nothing_else(mllm):
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    torch.manual_seed(1)
    encoder = get_encoder(attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0]))
    perturb(encoder)
    logits, _ = forward(model, batch)
    read = getattr(model.config, "vision_feature_layer", -1)
    last = max(read) if isinstance(read, list | tuple) else read
    vit, depth = encoder.vit, encoder.spec.depth
    detach(model)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    if last - 1 >= -depth:
        with pytest.raises(ConfigError, match=f"feature_layer={last - 1} would skip") as error:
            attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0], feature_layer=last - 1)
        assert f"feature_layer={last}" in str(error.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
        with pytest.raises(UnsupportedViTError, match="not attached"):
            get_encoder(model)
    torch.manual_seed(1)
    perturb(get_encoder(attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[0], feature_layer=last)))
    short, _ = forward(model, batch)
    torch.testing.assert_close(short, logits)


@every_mllm
def test_detach__gives_back_everything(mllm):
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    for parameter in model.base_model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    own = {name for name in vars(model) if not name.startswith("_")}
    before = model(**batch.inputs).logits
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    assert type(model) is classes[""]
    assert changed([model(**batch.inputs).logits], [before]) == [True]
    assert detach(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name for name in vars(model) if not name.startswith("_")} == own
    assert inspect.ismethod(model.forward)
    assert model.forward.__func__ is type(model).forward
    assert model.generate.__func__ is type(model).generate
    assert "context_text" not in inspect.signature(model.forward).parameters
    assert torch.equal(model(**batch.inputs).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    attach(model, TEXTS, tokenizer=mllm.tokenizer)


def test_detach__gives_back_a_method_that_another_library_had_replaced():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    calls = []

    def theirs(*args, **kwargs):
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = theirs
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    model(**batch.inputs)
    assert len(calls) == 1
    assert "context_text" not in calls[0]
    detach(model)
    assert model.forward is theirs


def test_signature__is_the_models_own_and_context_text():
    model = BY_NAME["llava"].build()
    own = inspect.signature(model.forward)
    attach(model, TEXTS, tokenizer=None)
    names = list(inspect.signature(model.forward).parameters)
    added = ["context_text", "context_index", "image_flags", "num_tiles"]
    assert names == [*list(own.parameters)[:-1], *added, "kwargs"]
    assert "image_flags" not in inspect.signature(model.generate).parameters
    assert inspect.signature(model.forward).parameters["context_text"].default is None
    assert (
        list(inspect.signature(model.base_model.get_image_features).parameters)
        == list(inspect.signature(type(model.base_model).get_image_features).parameters)[1:]
    )


# The right text for every image.


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
    base = model.base_model
    pixels = torch.randn(3, 3, 3, 32, 32)
    sizes = torch.tensor([(30, 60), (30, 60), (60, 20)])
    given = {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": torch.tensor([1, 2])}
    with get_encoder(model).condition("any"):
        lengths = [len(f) for f in base.get_image_features(**given, return_dict=True).pooler_output]
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
    model = whole.base_model
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
        length = len(model.get_video_features(frames).pooler_output[0])
    ids = torch.cat([torch.full((1, length), video), mllm_ids(mllm, CUP)], dim=1)
    with torch.no_grad():
        _, runs = watch(get_encoder(model).vit, lambda: model(ids, pixel_values_videos=frames))
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP, CUP])))
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


# Text that is given.


@every_mllm
def test_context_text__per_row_and_per_image(mllm):
    model, batch = attached(mllm.name)
    _, read = forward(model, batch)
    _, per_row = forward(model, batch, context_text=["one", "two", "three"])
    owners = {0: "one", 1: "two", 2: "three"}
    wanted = alone(model, read[0].images, [owners[row] for row in batch.row_of_tile])
    assert not any(changed(per_row[0].features, wanted))
    _, features = forward(model, batch, context_text=get_encoder(model).encode_text(["one", "two", "three"]))
    assert not any(changed(features[0].features, wanted))
    _, shared = forward(model, batch, context_text="one")
    assert not any(changed(shared[0].features, alone(model, read[0].images, ["one"] * len(batch.row_of_tile))))


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "qwen2_vl", "qwen2_5_vl", "mistral3"])
def test_context_text__per_image_of_one_row_each(name):
    rows = [Row(2, CUP), Row(2, DOG)]
    model, batch = attached(name, rows)
    _, read = forward(model, batch)
    asked = ["one", "two", "three", "four"]
    _, given = forward(model, batch, context_text=asked)
    tiles = [3, 5, 3, 3] if name == "llava_next" else [1] * 4
    per_tile = [text for text, count in zip(asked, tiles, strict=True) for _ in range(count)]
    assert not any(changed(given[0].features, alone(model, read[0].images, per_tile)))
    with pytest.raises(ShapeError, match="context_text does not fit"):
        forward(model, batch, context_text=["one", "two", "three"])


def test_context_text__an_open_condition_is_the_text():
    model, batch = attached("llava")
    with get_encoder(model).condition(["one", "two"], index=[0, 1, 1]):
        _, given = forward(model, batch)
        tokens = model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    assert not any(changed(given[0].features, alone(model, given[0].images, ["one", "two", "two"])))
    assert torch.equal(
        tokens,
        model.generate(**batch.inputs, context_text=["one", "x", "two"], max_new_tokens=2, do_sample=False),
    )


def test_context_text__of_get_image_features():
    model, batch = attached("llava_next")
    images = {name: batch.inputs[name] for name in ("pixel_values", "image_sizes")}
    with pytest.raises(MissingContextError, match="called without text"):
        model.get_image_features(**images)
    with torch.no_grad():
        _, runs = watch(
            get_encoder(model).vit,
            lambda: model.get_image_features(**images, context_text=["one", "two", "three"]),
        )
    per_tile = ["one"] * 3 + ["two"] * 5 + ["three"] * 3
    assert not any(changed(runs[0].features, alone(model, runs[0].images, per_tile)))


def test_context_text__replaces_a_prompt_that_cannot_be_read():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    attach(model, TEXTS, tokenizer=None)
    with pytest.raises(MissingContextError, match=r"context_text=\['the question of row 0'"):
        model(**batch.inputs)
    assert model(**batch.inputs, context_text=[CUP, DOG, PEOPLE]).logits.isfinite().all()
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    given = {**batch.inputs, "input_ids": None, "inputs_embeds": embeds}
    with pytest.raises(MissingContextError, match="no prompt to read"):
        model(**given)
    assert model(**given, context_text=[CUP, PEOPLE, PEOPLE]).logits.isfinite().all()


def test_routing_that_needs_no_text__reads_nothing():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    attach(model, None, tokenizer=None, routing="uniform")
    assert model(**batch.inputs).logits.isfinite().all()
    assert model.generate(**batch.inputs, max_new_tokens=1, do_sample=False).shape[0] == 3


# generate().

WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


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
    assert (times > 1) == (mllm.layout == "rows" and way != "greedy")  # its tower runs after the rows are repeated
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


# Copies.


@pytest.mark.parametrize("name", ["llava", "internvl", "smolvlm", "qwen2_5_vl", "pixtral", "mllama"])
def test_deepcopy__has_its_own_methods_and_tower(name):
    model, batch = attached(name)
    before, _ = forward(model, batch)
    twin = copy.deepcopy(model)
    assert get_encoder(twin) is not get_encoder(model)
    assert get_encoder(twin).vit in set(twin.modules())
    assert twin.forward.attachment.model is twin
    assert twin.forward.attachment.reader is model.forward.attachment.reader
    assert torch.equal(forward(twin, batch)[0], before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(forward(model, batch)[0], before)
    assert not forward(twin, batch)[0].any()
    detach(twin)
    assert torch.equal(forward(model, batch)[0], before)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "pixtral"])
def test_pickle__keeps_all_but_the_text_encoder(name):
    mllm = BY_NAME[name]
    model = mllm.build()
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    twin = pickle.loads(pickle.dumps(model))  # before a forward: transformers' own hooks cannot be pickled
    batch = mllm.batch(detach(copy.deepcopy(model)), MIXED)
    with pytest.raises(TextEncoderError, match="left behind by pickling"):
        twin(**batch.inputs)
    get_encoder(twin).set_text_encoder(TEXTS)
    assert torch.equal(twin(**batch.inputs).logits, model(**batch.inputs).logits)
    detach(twin)


# Training.


PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "pixtral", "mistral3"]


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "mllama", *PACKED])
def test_gradient_checkpointing__of_the_whole_model_is_exact(name):
    model, batch = attached(name)
    model.double().train()
    inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].double()}
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}

    def gradients():
        model.zero_grad()
        first = model(**inputs, labels=labels).loss
        second = model(**other, context_text=["one", "two", "three"], labels=labels).loss
        (first + 2 * second).backward()  # recomputes the first after the second was run
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert any(".experts." in n and plain[n].abs().max() > 0 for n in plain)
    assert any(".router." in n and plain[n].abs().max() > 0 for n in plain)
    model.activation_checkpointing_enable()
    again = gradients()
    assert again.keys() == plain.keys()
    assert all(torch.allclose(again[n], plain[n], rtol=1e-9, atol=1e-12) for n in plain)


@pytest.mark.parametrize("column", [False, True], ids=["read", "given"])
def test_trainer__trains_and_evaluates(column, tmp_path):
    from transformers import Trainer, TrainingArguments

    mllm = BY_NAME["llava"]
    plain = mllm.build()
    model = attach(copy.deepcopy(plain), TEXTS, tokenizer=None if column else mllm.tokenizer)
    perturb(get_encoder(model))
    batch = mllm.batch(plain, [Row(1, CUP), Row(1, PEOPLE), Row(1, DOG), Row(1, CUP)])
    samples = [
        {
            "input_ids": batch.inputs["input_ids"][i],
            "attention_mask": batch.inputs["attention_mask"][i],
            "pixel_values": batch.inputs["pixel_values"][i : i + 1],
            "labels": batch.inputs["input_ids"][i].clone(),
            "context_text": MIXED[0].question,
            "not_for_the_model": 1,
        }
        for i in range(4)
    ]
    seen: list[set[str]] = []

    def collate(rows):
        seen.append({name for row in rows for name in row})
        stacked = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels")}
        given = {"context_text": [row["context_text"] for row in rows]} if column else {}
        return {**stacked, **given, "pixel_values": torch.cat([row["pixel_values"] for row in rows])}

    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        activation_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, args, train_dataset=samples, eval_dataset=samples, data_collator=collate)
    assert trainer.train().training_loss > 0
    assert seen[0] == {"input_ids", "attention_mask", "pixel_values", "labels", "context_text"}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in get_encoder(model).named_parameters() if p.requires_grad}
    tower = {f"model.vision_tower.{name.removeprefix('vit.')}" for name in trained}
    assert tower <= moved
    assert not {name for name in moved if name.startswith("model.vision_tower.")} - tower
    assert trainer.evaluate()["eval_loss"] > 0


def test_accelerate__mixed_precision_wraps_and_unwraps(request):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, batch = attached("llava")
    wanted, _ = forward(model, batch)
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests, and for them
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    logits, runs = forward(prepared, batch)
    assert logits.dtype == torch.float32
    assert len(runs) == 1
    assert "context_text" in inspect.signature(prepared.forward).parameters
    with pytest.raises(UnsupportedViTError, match="Another library has replaced model"):
        detach(model)
    back = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(forward(back, batch)[0], wanted)
    detach(back)


def test_peft__attached_before_or_inside():
    peft = pytest.importorskip("peft")

    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    config = peft.LoraConfig(target_modules=r".*language_model.*\.q_proj")
    wrapped = peft.get_peft_model(model, config)
    assert attach(wrapped, TEXTS, tokenizer=mllm.tokenizer) is wrapped
    perturb(get_encoder(wrapped))
    _, runs = forward(wrapped, batch)
    assert not any(changed(runs[0].features, alone(wrapped, runs[0].images, [CUP, PEOPLE, PEOPLE])))
    assert wrapped.generate(**batch.inputs, max_new_tokens=2, do_sample=False).shape[0] == 3
    assert any(p.requires_grad for n, p in wrapped.named_parameters() if ".experts." in n)
    detach(wrapped)


# Saving.


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "mllama"])
def test_save_pretrained__writes_the_model_as_it_was_and_the_tower_beside_it(name, tmp_path):
    mllm = BY_NAME[name]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name] + 1 if name == "lm_head.weight" else state[name]), name
    attach(loaded, TEXTS, tokenizer=mllm.tokenizer, pretrained=tmp_path / "covft")
    assert torch.equal(forward(loaded.eval(), batch)[0], forward(model, batch)[0])


def test_save_pretrained__of_a_model_that_was_cast_and_of_a_state_that_was_gathered(tmp_path):
    from safetensors.torch import load_file

    model, _ = attached("internvl")
    model.to(torch.bfloat16)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    loaded = type(model).from_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    plain = detach(model).state_dict()
    assert loaded.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.state_dict().items())


def test_save_pretrained__what_it_cannot_write_it_refuses(tmp_path):
    model, _ = attached("llava")
    with pytest.raises(CheckpointError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    with pytest.raises(CheckpointError, match="distributed_checkpoint"):
        model.save_pretrained(tmp_path / "a", distributed_checkpoint=True)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b" / "covft").exists()


def test_push_to_hub__takes_the_tower_along(monkeypatch):
    from transformers.utils import hub

    model, _ = attached("llava")
    seen: set[str] = set()

    def upload(self, folder, *args, **kwargs):
        seen.update(str(file.relative_to(folder)) for file in Path(folder).rglob("*"))

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: type("Repo", (), {"repo_id": repo_id})
    )
    model.push_to_hub("me/mine")
    assert {"config.json", "model.safetensors", "covft/covft_config.json", "covft/model.safetensors"} <= seen


def test_pipeline__asks_about_a_picture():
    pytest.importorskip("PIL")
    from PIL import Image
    from transformers import CLIPImageProcessor, ImageTextToTextPipeline, LlavaProcessor

    mllm = BY_NAME["llava"]
    model, _ = attached("llava")
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=mllm.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    ask = ImageTextToTextPipeline(model=model, processor=processor)
    vit = get_encoder(model).vit
    picture = Image.new("RGB", (40, 40), "red")
    given = {"text": f"USER: <image>\n{CUP} ASSISTANT:", "max_new_tokens": 2}
    answer, runs = watch(vit, lambda: ask(images=picture, **given))
    assert isinstance(answer[0]["generated_text"], str)
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP])))


# What is refused.


def test_refused__and_nothing_is_changed():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    with pytest.raises(UnsupportedViTError, match="is not attached"):
        get_encoder(model)
    with pytest.raises(UnsupportedViTError, match="is not attached"):
        detach(model)
    with pytest.raises(ConfigError, match="turns='second'"):
        attach(model, TEXTS, tokenizer=mllm.tokenizer, turns="second")
    with pytest.raises(ConfigError, match="no tokenizer"):
        attach(model, TEXTS, tokenizer="a name")
    with pytest.raises(covft.errors.LayerIndexError):
        attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[9])
    with pytest.raises(ConfigError, match="saved tower has its own settings"):
        attach(model, TEXTS, tokenizer=mllm.tokenizer, experts=2, pretrained="somewhere")
    assert inspect.ismethod(model.forward)
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    with pytest.raises(UnsupportedViTError, match="attached already"):
        attach(model, TEXTS, tokenizer=mllm.tokenizer)


def test_refused__models_without_a_tower_that_can_be_served():
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MiniCPMV4_6Config,
        MiniCPMV4_6ForConditionalGeneration,
    )

    with pytest.raises(UnsupportedViTError, match="not a model of transformers"):
        attach(nn.Linear(2, 2), TEXTS, tokenizer=None)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UnsupportedViTError, match="no vision tower"):
        attach(LlamaForCausalLM(LlamaConfig(vocab_size=32, **small)), TEXTS, tokenizer=None)
    with torch.device("meta"):
        text = {**small, "model_type": "qwen3_5_text", "vocab_size": 32}
        packed = MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(vision_config=small, text_config=text))
    with pytest.raises(UnsupportedViTError, match="target_sizes="):
        attach(packed, TEXTS, tokenizer=None)
    towerless = BY_NAME["llava"].build()
    towerless.model.vision_tower = nn.Linear(2, 2)
    with pytest.raises(UnsupportedViTError, match="covft cannot wrap"):
        attach(towerless, TEXTS, tokenizer=None)


def test_refused__images_without_any_placeholder():
    model, batch = attached("llava")
    ids = batch.inputs["input_ids"]
    with pytest.raises(ShapeError, match="is unknown"):
        forward(model, batch, input_ids=ids.where(ids != model.config.image_token_id, 0))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_refused__images_that_belong_to_no_row(name):
    model, batch = attached(name)
    mllm = BY_NAME[name]
    ids = batch.inputs["input_ids"].clone()
    image = mllm.tokenizer.convert_tokens_to_ids("<image>")
    ids[0, (ids[0] == image).nonzero()[0]] = mllm.tokenizer.pad_token_id
    with pytest.raises(ShapeError, match="is unknown"):
        forward(model, batch, input_ids=ids)
    # In a single row there is nothing to find out; the model itself sees the mistake.
    one = {key: value[-2:] for key, value in batch.inputs.items() if key in ("pixel_values", "image_sizes")}
    cut = batch.inputs["input_ids"][2:].clone()
    cut[0, (cut[0] == image).nonzero()[0]] = mllm.tokenizer.pad_token_id
    with pytest.raises(ValueError, match="do not match"):
        model(**one, input_ids=cut)
    if name == "llava_next":
        with pytest.raises(ShapeError, match="have no image_sizes"):
            model(input_ids=ids, pixel_values=batch.inputs["pixel_values"])
        more = {key: torch.cat([batch.inputs[key], batch.inputs[key][:1]]) for key in ("pixel_values", "image_sizes")}
        with pytest.raises(ShapeError, match="is unknown"):
            forward(model, batch, **more)


def test_refused__rows_that_are_packed_from_several_samples():
    model, batch = attached("llava", [Row(1, CUP), Row(1, "a dog?")])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "attention_mask": None,
    }
    with pytest.raises(ShapeError, match="packed"):
        forward(model, batch, **packed)
    _, runs = forward(model, batch, **packed, context_text=[CUP, "a dog?"])
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP, "a dog?"])))
    # Positions that only leave out the padding say nothing of the kind.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert (positions == 0).sum(1).max() > 1
    _, runs = forward(model, batch, position_ids=positions)
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP, "a dog?"])))


def test_refused__images_of_another_shape():
    model, batch = attached("llava")
    with pytest.raises(ShapeError, match=r"\(images, 3, H, W\)"):
        forward(model, batch, pixel_values=batch.inputs["pixel_values"][None])
    other, batch = attached("idefics3")
    with pytest.raises(ShapeError, match=r"\(rows, images, 3, H, W\)"):
        forward(other, batch, pixel_values=batch.inputs["pixel_values"][0])
