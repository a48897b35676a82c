"""Multimodal LLMs whose tower sees all images as one sequence: sizes, videos, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
import transformers

import covft
from covft.errors import MissingContextError, ShapeError, UnsupportedViTError
from covft.integrations import attach, get_encoder
from covft.integrations.mllm.families import find_tower
from tests.helpers.attached import CUP, DOG, MIXED, PEOPLE, TEXTS, alone, attached, changed, forward
from tests.helpers.mllms import ALIKE, BY_NAME, MLLM, Row, kinds_of
from tests.helpers.towers import PATCH, perturb
from tests.helpers.watching import watch

pytestmark = pytest.mark.usefixtures("quiet")
GRID = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]
WITH_VIDEOS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@pytest.mark.parametrize("mllm", ALIKE, ids=str)
def test_alike__models_that_are_built_like_others(mllm):
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    before = model(**batch.inputs).logits
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    assert (model(**batch.inputs).logits - before).abs().max() <= 1e-5 * before.abs().max()
    perturb(get_encoder(model))
    _, (run,) = forward(model, batch)
    assert not any(changed(run.features, alone(model, run.images, [CUP, PEOPLE, PEOPLE])))
    assert model.generate(**batch.inputs, max_new_tokens=2, num_beams=2, do_sample=False).shape[0] == 3


def videos(mllm: MLLM, grids: list[tuple[int, int, int]], questions: list[str]) -> dict:
    """A batch with a video per row; the token that begins a text stands for one of its placeholders."""
    placeholder = mllm.tokenizer.bos_token
    texts = []
    for (frames, height, width), question in zip(grids, questions, strict=True):
        # Qwen3-VL and later write a block per frame, the others one for all.
        blocks = frames if mllm.name in ("qwen3_vl", "qwen3_5") else 1
        block = f"<img>{placeholder * (frames * height * width // 4 // blocks)}</img>"
        content = [{"role": "user", "content": f"{block * blocks}\n{question}"}]
        texts.append(mllm.tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True))
    inputs = mllm.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = inputs["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": inputs["attention_mask"],
        **kinds_of(mllm, (ids == mllm.tokenizer.bos_token_id).int() * 2),
        "pixel_values_videos": torch.randn(sum(t * h * w for t, h, w in grids), 6 * PATCH * PATCH),
        "video_grid_thw": torch.tensor(grids),
    }


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos__each_has_the_question_of_its_row(name):
    model, _ = attached(name)
    questions = [CUP, PEOPLE, DOG]
    batch = videos(BY_NAME[name], [(2, 4, 6), (1, 2, 2), (3, 2, 4)], questions)
    with torch.no_grad():
        _, (run,) = watch(get_encoder(model).vit, lambda: model(**batch))
        assert not any(changed(run.features, alone(model, run.images, questions)))
        assert all(changed(run.features, alone(model, run.images, questions[::-1]))[::2])
        _, (given,) = watch(get_encoder(model).vit, lambda: model(**batch, context_text=["one", "two", "three"]))
    assert not any(changed(given.features, alone(model, run.images, ["one", "two", "three"])))
    if name == "qwen3_vl" and transformers.__version__ < "5":
        return  # its own beams fail for videos: each frame counts as one
    options = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2}
    _, (generated,) = watch(get_encoder(model).vit, lambda: model.generate(**batch, **options))
    times = len(generated.features) // len(run.features)  # in many releases the tower runs after the expansion
    assert times in (1, 2)
    assert not any(changed(generated.features, [film for film in run.features for _ in range(times)]))


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos__features_follow_the_text_that_is_given(name):
    model, _ = attached(name)
    batch = videos(BY_NAME[name], [(2, 4, 6), (1, 2, 2)], [CUP, DOG])
    films = {argument: batch[argument] for argument in ("pixel_values_videos", "video_grid_thw")}
    assert {"context_text", "context_index"} <= set(inspect.signature(model.get_video_features).parameters)
    with pytest.raises(MissingContextError, match="called without text"):
        model.get_video_features(**films)
    for texts, expected in ((["one", "two"], ["one", "two"]), (["two", "one"], ["two", "one"]), ("one", ["one"] * 2)):
        with torch.no_grad():
            _, (run,) = watch(
                get_encoder(model).vit, lambda texts=texts: model.get_video_features(**films, context_text=texts)
            )
            assert not any(changed(run.features, alone(model, run.images, expected)))
            assert all(changed(run.features[:1], alone(model, run.images, ["three", "three"])[:1]))
    with pytest.raises(ShapeError, match="context_text does not fit"):
        model.get_video_features(**films, context_text=["one", "two", "three"])
    covft.detach(model)
    assert "context_text" not in inspect.signature(model.get_video_features).parameters


def test_videos__and_images_in_one_call_have_one_text():
    mllm = BY_NAME["qwen2_5_vl"]
    model, images = attached("qwen2_5_vl", [Row(1, CUP)])
    film = videos(mllm, [(2, 4, 4)], [CUP])
    both = {**images.inputs, **{name: film[name] for name in ("pixel_values_videos", "video_grid_thw")}}
    for name in film.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
        both[name] = torch.cat([film[name], images.inputs[name]], dim=1)
    question = f"{CUP} {CUP}"  # two turns
    with torch.no_grad():
        _, runs = watch(get_encoder(model).vit, lambda: model(**both))
    assert [run.images[0]["grid_thw"].tolist() for run in runs] == [[[1, 4, 6]], [[2, 4, 4]]]
    for run in runs:
        assert not any(changed(run.features, alone(model, run.images, [question])))
    with pytest.raises(ShapeError, match="separate calls"):
        model(**both, context_text=["one", "two"])


def test_videos__of_models_that_make_images_of_frames_have_one_text():
    model, _ = attached("glm4v")
    encoder = get_encoder(model)
    grid = torch.tensor([[2, 4, 6], [1, 2, 2]])
    film = {"pixel_values_videos": torch.randn(52, 6 * PATCH * PATCH), "video_grid_thw": grid}
    with torch.no_grad(), encoder.condition("what?"):
        _, (run,) = watch(encoder.vit, lambda: model.get_video_features(**film))
    assert not any(changed(run.features, alone(model, run.images, ["what?"] * 3)))


@pytest.mark.parametrize("name", GRID)
def test_refused__a_grid_that_is_not_that_of_the_prompt(name):
    model, batch = attached(name)
    grid = batch.inputs["image_grid_thw"]
    with pytest.raises(ShapeError, match="is unknown"):
        forward(model, batch, image_grid_thw=grid.flip(0))
    with pytest.raises(ShapeError, match="image_grid_thw of shape"):
        forward(model, batch, image_grid_thw=None)
    with pytest.raises(ShapeError, match="context_text does not fit"):
        forward(model, batch, context_text=["one", "two"])
    with torch.no_grad(), pytest.raises(MissingContextError, match="called without text"):
        model.get_image_features(batch.inputs["pixel_values"], grid)


def test_refused__packed_rows_by_the_positions_of_their_text():
    model, batch = attached("qwen2_5_vl", [Row(1, CUP), Row(1, DOG)])
    ids, kept = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    rows = [row[keep] for row, keep in zip(ids, kept, strict=True)]
    text = torch.cat([torch.arange(len(row)) for row in rows])
    packed = {
        "input_ids": torch.cat(rows)[None],
        "attention_mask": None,
        "mm_token_type_ids": None,
        "position_ids": text.expand(4, 1, -1),
    }
    with pytest.raises(ShapeError, match="packed"):
        forward(model, batch, **packed)
    _, (run,) = forward(model, batch, **packed, context_text=[CUP, DOG])
    assert not any(changed(run.features, alone(model, run.images, [CUP, DOG])))
    # The three axes of an image that begins a row are zero more than once, which says nothing.
    one = {**packed, "input_ids": rows[0][None], "position_ids": torch.zeros(3, 1, len(rows[0]), dtype=torch.long)}
    images = {"pixel_values": batch.inputs["pixel_values"][:24], "image_grid_thw": batch.inputs["image_grid_thw"][:1]}
    _, (run,) = forward(model, batch, **one, **images)
    assert not any(changed(run.features, alone(model, run.images, [CUP])))


def test_pixtral__without_sizes_every_image_is_whole():
    mllm = BY_NAME["pixtral"]
    model, _ = attached("pixtral", [Row(1, CUP)])
    pixels = torch.randn(1, 3, 4 * PATCH, 4 * PATCH)
    inputs = mllm.tokenizer(mllm.prompt(Row(1, CUP), [16]), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        _, (run,) = watch(get_encoder(model).vit, lambda: model(inputs["input_ids"], pixel_values=pixels))
    (wanted,) = alone(model, [{"pixel_values": pixels}], [CUP])
    assert not any(changed([run.features[0]], [wanted]))


@pytest.mark.skipif(not hasattr(transformers, "LightOnOcrConfig"), reason="transformers has no LightOnOcr")
def test_pixtral__found_in_a_model_outside_the_table():
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration, PixtralVisionConfig

    mllm = BY_NAME["mistral3"]
    base = mllm.build().config
    config = LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**base.vision_config.to_dict()),
        text_config={**base.text_config.to_dict(), "model_type": "qwen3", "head_dim": 8},
        image_token_id=base.image_token_index,
        spatial_merge_size=2,
    )
    model = LightOnOcrForConditionalGeneration(config).eval()
    assert find_tower(model)[1].layout == "sizes"
    batch = mllm.batch(model, [Row(1, CUP), Row(2, DOG)])
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    _, (run,) = forward(model, batch)
    assert not any(changed(run.features, alone(model, run.images, [CUP, DOG, DOG])))


def test_refused__a_packed_tower_whose_sizes_have_another_name():
    model = BY_NAME["qwen2_vl"].build()

    class Renamed:
        name = "renamed"

        def matches(self, vit):
            return True

        def describe(self, vit):
            spec = covft.describe(vit)
            return dataclasses.replace(spec, input=dataclasses.replace(spec.input, sizes_argument="kwargs"))

    with pytest.raises(UnsupportedViTError, match="which argument has the image sizes"):
        attach(model, TEXTS, tokenizer=None, adapter=Renamed())


# Rows that are padded to equally many images and tiles (Mllama).


def test_rows__padding_goes_with_the_image_before_it_or_the_first():
    rows = [Row(0, DOG), Row(1, CUP), Row(3, PEOPLE), Row(1, DOG)]
    model, batch = attached("mllama", rows)
    _, (run,) = forward(model, batch)
    assert not any(changed(run.features, alone(model, run.images, [CUP, PEOPLE, PEOPLE, PEOPLE, DOG])))
    asked = ["one", "two", "three", "four", "five"]
    _, (given,) = forward(model, batch, context_text=asked)
    assert not any(changed(given.features, alone(model, run.images, asked)))
    with pytest.raises(ShapeError, match="context_text does not fit"):
        forward(model, batch, context_text=asked[:3])
    with pytest.raises(ShapeError, match=r"\(rows, images, tiles, 3, H, W\)"):
        forward(model, batch, pixel_values=batch.inputs["pixel_values"][0])


def test_rows__texts_of_a_condition_are_repeated_by_generate_alone():
    model, batch = attached("mllama", [Row(1, CUP), Row(1, DOG)])
    twice = {name: value.repeat_interleave(2, dim=0) for name, value in batch.inputs.items()}
    with get_encoder(model).condition(["one", "two"]):
        _, (run,) = forward(model, batch)
        model.generate(**batch.inputs, num_beams=2, max_new_tokens=1, do_sample=False)
        with pytest.raises(ShapeError, match="4 images, but the text is for 2"):
            model(**twice)
    assert not any(changed(run.features, alone(model, run.images, ["one", "two"])))
