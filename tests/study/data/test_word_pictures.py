"""Word pictures: what each patch says, and batches whose questions are as if asked alone."""

from __future__ import annotations

import pytest
import torch

from covft.data import IGNORE_INDEX
from study.data.scenes import Arrow, Scene, Thing, make_scenes
from study.data.tasks import all_words, make_examples
from study.data.tiles import tiles
from study.data.tokenizer import build_tokenizer
from study.data.word_pictures import make_word_pictures, word_picture
from study.llava import new_language_model


def _scene() -> Scene:
    pool = tiles("train")
    circle, digit, photo = (pool[kind][0] for kind in ("shape", "digit", "photo"))
    things = (Thing(circle, 0, small=True), Thing(digit, 2, small=True), Thing(photo, 6))
    return Scene(0, "train", things, 1, arrows=(Arrow(2, 0),))


def test_every_patch_says_what_is_in_its_cell_and_where_that_is() -> None:
    scene = _scene()
    shape, digit, photo = (thing.tile for thing in scene.things)
    bags = [word_picture(scene)[6 * y : 6 * y + 6] for y in range(6)]
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert bags[y][x] == ["small", shape.colour, shape.name, "top", "left"]
        assert bags[y][2 + x] == ["arrow", "top", "centre"]
        assert bags[y][4 + x] == ["small", "digit", digit.name, "arrow", "leftward", "top", "right"]
        assert bags[4 + y][x] == ["big", "photo", photo.name, "bottom", "left"]
        assert bags[4 + y][4 + x] == ["blank", "bottom", "right"]
    assert {word for scene in make_scenes("train", 30) for bag in word_picture(scene) for word in bag} <= set(
        all_words()
    )


@pytest.mark.parametrize("side", [6, 2])
def test_questions_in_one_row_are_as_if_asked_alone(side: int) -> None:
    tokenizer, scenes = build_tokenizer(), make_scenes("train", 4)
    model = new_language_model(tokenizer).eval()
    asked = [[(e.question, e.answer) for e in make_examples(scenes) if e.scene == i] for i in range(4)]
    together = make_word_pictures(tokenizer, list(zip(scenes, asked, strict=True)))
    batch = together.batch(model, torch.arange(4), side=side)
    assert batch["inputs_embeds"].shape[1] == 1 + side * side + together.ids_RL.shape[1]
    with torch.no_grad():
        logits = model(**batch).logits
        for row, scene in enumerate(scenes):
            found = logits[row][batch["labels"][row] != IGNORE_INDEX]
            parts = []
            for turn in asked[row]:
                alone = make_word_pictures(tokenizer, [(scene, [turn])]).batch(model, torch.tensor([0]), side=side)
                own = alone["labels"][0] != IGNORE_INDEX
                assert tokenizer.decode(alone["labels"][0][own]) == f"{turn[1]} <eos>"
                # by transformers' own causal mask
                plain = model(inputs_embeds=alone["inputs_embeds"], position_ids=alone["position_ids"]).logits
                parts.append(plain[0][own])
            torch.testing.assert_close(found, torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_image_tokens_are_means_over_squares_of_summed_words() -> None:
    tokenizer, scene = build_tokenizer(), _scene()
    model = new_language_model(tokenizer)
    ids, table = tokenizer.get_vocab(), model.get_input_embeddings().weight
    data = make_word_pictures(tokenizer, [(scene, [("read the digit .", "two")])])
    patches = torch.stack([sum(table[ids[word]] for word in bag) for bag in word_picture(scene)]).view(6, 6, -1)
    for side in (6, 3, 2):
        found = data.batch(model, torch.tensor([0]), side=side)["inputs_embeds"][0, 1 : 1 + side * side]
        each = 6 // side
        wanted = [
            patches[y * each : (y + 1) * each, x * each : (x + 1) * each].mean((0, 1))
            for y in range(side)
            for x in range(side)
        ]
        torch.testing.assert_close(found, torch.stack(wanted))
    nothing = data.batch(model, torch.tensor([0]), dropped=1.0)["inputs_embeds"][0, 1:37]
    assert not nothing.any()
