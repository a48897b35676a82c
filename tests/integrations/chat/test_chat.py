"""Each policy of later questions against the model's own forward of the complete conversation, texts given by hand."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import covft
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations import attach, get_encoder
from tests.helpers.attached import TEXTS
from tests.helpers.releases import skip_before
from tests.helpers.towers import perturb
from tests.tiny.folders import build

FIRST, SECOND, THIRD = "what is left of the cup?", "how many people?", "and the dog?"
FAMILIES = ("llava", "qwen2_5_vl", "internvl")
every_family = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.long if family == "internvl" else ()) for family in FAMILIES]
)


class Seen:
    """Notes the logits of the first token of each answer."""

    def __init__(self):
        self.first, self.length = [], 0

    def __call__(self, ids, scores):
        if not self.first or ids.shape[1] != self.length + 1:
            self.first.append(scores[0].clone())
        self.length = ids.shape[1]
        return scores


def picture(seed=0):
    pixels = torch.randint(256, (32, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def chatting(family, policy, **settings):
    """A chat in float64 with a model whose text matters, and what it sees of the logits."""
    model, processor = build(family)
    model = model.double()
    attach(model, TEXTS, tokenizer=processor, **settings)
    perturb(get_encoder(model), 0.3)
    seen = Seen()
    chat = covft.Chat(model, processor, policy, max_new_tokens=4, do_sample=False, logits_processor=[seen])
    return chat, model, processor, seen.first


def logits(model, processor, history, question, images, texts):
    """The logits after a conversation, from one forward; `images` says which turns show a picture."""
    messages = []
    for number, asked in enumerate([*(asked for asked, _ in history), question]):
        shown = [{"type": "image", "image": image} for image in images.get(number, [])]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": asked}]})
        if number < len(history):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": history[number][1]}]})
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    inputs = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    tiled = {"internvl": 0, "idefics3": 1}  # those that cut a picture into images, by the axis of these
    if len(texts) > 1 and model.config.model_type in tiled:
        tiles = inputs["pixel_values"].shape[tiled[model.config.model_type]] // len(texts)
        inputs["context_index"] = torch.arange(len(texts)).repeat_interleave(tiles)
    with torch.no_grad():
        return model(**inputs, context_text=texts).logits[0, -1]


def agree(one, other):
    return torch.allclose(one.double(), other, rtol=1e-5, atol=1e-6)  # generate gives its scores in float32


OTHERS = ("llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "idefics3")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in ("llava", "qwen2_5_vl") else pytest.mark.long) for f in (*FAMILIES, *OTHERS)],
)
@pytest.mark.parametrize("policy", ["reencode", "keep", "append"])
def test_a_later_answer_comes_from_the_right_features(family, policy):
    chat, model, processor, seen = chatting(family, policy)
    image = picture()
    chat.ask(FIRST, image)
    chat.ask(SECOND)
    history = chat.history
    chat.ask(THIRD)
    assert [asked for asked, _ in history] == [FIRST, SECOND]

    def after(number, texts):
        shown = {turn: [image] for turn in range(number + 1 if policy == "append" else 1)}
        return logits(model, processor, history[:number], (SECOND, THIRD)[number - 1], shown, texts)

    right = {
        "reencode": ([f"{FIRST} {SECOND}"], [f"{FIRST} {SECOND} {THIRD}"]),
        "keep": ([FIRST], [FIRST]),
        "append": ([FIRST, SECOND], [FIRST, SECOND, THIRD]),
    }[policy]
    swapped = {
        "reencode": ([FIRST], [SECOND]),
        "keep": ([SECOND], [SECOND]),
        "append": ([SECOND, FIRST], [FIRST, THIRD, SECOND]),
    }[policy]
    for number in (1, 2):
        assert agree(seen[number], after(number, right[number - 1]))
        assert not agree(seen[number], after(number, swapped[number - 1]))


@every_family
def test_reencode_is_a_fresh_conversation_bit_for_bit(family):
    chat, model, processor, seen = chatting(family, "reencode", turns="last")
    image = picture()
    chat.ask(FIRST, image)
    answer = chat.ask(SECOND)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": FIRST}]},
        {"role": "assistant", "content": [{"type": "text", "text": chat.history[0][1]}]},
        {"role": "user", "content": [{"type": "text", "text": SECOND}]},
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    inputs = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    fresh = Seen()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=4, logits_processor=[fresh])
    assert torch.equal(seen[1], fresh.first[0])
    length = inputs["input_ids"].shape[1]
    assert answer == processor.tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()


def test_the_trunk_runs_once_for_a_picture():
    chat, model, _, _ = chatting("llava", "reencode", layers=[2])
    rows = [0, 0]
    vit = get_encoder(model).vit
    for place, layer in enumerate((0, 2)):
        slot = vit.get_submodule(get_encoder(model).spec.blocks[layer].mlp_path)
        slot.register_forward_hook(lambda module, args, output, place=place: rows.__setitem__(place, rows[place] + 1))
    chat.ask(FIRST, picture())
    chat.ask(SECOND)
    chat.ask(THIRD)
    assert rows == [1, 3]


def runs_of(module):
    """The number of tokens in each run of a module."""
    lengths = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["inputs_embeds"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


@pytest.mark.parametrize(("family", "policy"), [(f, "keep") for f in FAMILIES] + [("llava", "append")])
def test_only_new_tokens_are_computed_where_the_cache_is_continued(family, policy):
    if policy == "append":
        skip_before((5, 0), "a generate that takes pictures where it continues a cache")
    chat, model, _, _ = chatting(family, policy)
    chat.ask(FIRST, picture())
    towers = []
    get_encoder(model).vit.register_forward_hook(lambda *_: towers.append(1))
    lengths = runs_of(model.model.language_model)
    chat.ask(SECOND)
    assert len(towers) == (policy == "append")
    pictures = 16 if policy == "append" else 0
    assert 0 < lengths[0] - pictures < 60  # bytes of the question and of the template's marks


def test_two_chats_with_one_model_do_not_disturb_each_other():
    chat, model, processor, _ = chatting("qwen2_5_vl", "keep")
    other = covft.Chat(model, processor, "keep", max_new_tokens=4, do_sample=False)
    image = picture()
    chat.ask(FIRST, image)
    alone = [chat.ask(SECOND), chat.ask(THIRD)]
    chat.reset()
    chat.ask(FIRST, image)
    mixed = []
    for question in (SECOND, THIRD):
        other.ask(question, Image.new("RGB", (64, 24)))
        mixed.append(chat.ask(question))
    assert mixed == alone


def test_a_new_picture_is_encoded_for_the_question_that_shows_it():
    chat, model, processor, seen = chatting("llava", "keep")
    chat.ask(FIRST, picture(1))
    history = chat.history
    chat.ask(SECOND, picture(2))
    shown = {0: [picture(1)], 1: [picture(2)]}
    assert agree(seen[1], logits(model, processor, history, SECOND, shown, [FIRST, SECOND]))
    assert not agree(seen[1], logits(model, processor, history, SECOND, shown, [FIRST, FIRST]))


def test_routing_is_that_of_the_last_question():
    chat, model, _, _ = chatting("llava", "reencode", turns="last")
    assert chat.routing() == {}
    chat.ask(FIRST, picture())
    first = chat.routing()
    chat.ask(SECOND)
    second = chat.routing()
    expected = get_encoder(model).routing_weights()
    for layer in get_encoder(model).layers:
        assert torch.equal(second[layer], expected[layer])
        assert not torch.allclose(first[layer], second[layer])
    chat.reset()
    assert (chat.routing(), chat.history) == ({}, [])


def test_a_refused_question_leaves_the_conversation_as_it_was(tmp_path):
    chat, _, _, _ = chatting("llava", "append")
    chat.ask(FIRST, picture())
    before = chat.history
    for question, image in [(" ", None), (SECOND, 3), (SECOND, tmp_path / "none.png")]:
        with pytest.raises(covft.errors.CoVFTError):
            chat.ask(question, image)
    assert chat.history == before


def test_wrong_arguments_are_refused():
    model, processor = build("llava")
    with pytest.raises(UnsupportedViTError, match="not attached"):
        covft.Chat(model, processor)
    attach(model, TEXTS, tokenizer=processor)
    with pytest.raises(ConfigError, match=r"reencode \| keep \| append"):
        covft.Chat(model, processor, "forget")
    with pytest.raises(ConfigError, match="the model's processor"):
        covft.Chat(model, processor.tokenizer)
