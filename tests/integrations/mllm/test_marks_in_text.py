"""Questions and answers that spell the marks of the chat template are read to their end, or the row is refused."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from covft.errors import MissingContextError
from covft.integrations.mllm.prompt import PromptReader
from tests.helpers.prompts import IMAGE, TEMPLATES, render, tokenizer_of

ONE, TWO, YES = "what is left of the cup?", "a dog and where?", "a red ball."
every_template = pytest.mark.parametrize("template", TEMPLATES)

# What a template writes before a question, before an answer, and after an answer; by hand.
MARKS = {
    "vicuna": ("USER:", "ASSISTANT:", "</s>"),
    "llava-hf": ("USER:", "ASSISTANT:", ""),
    "llama-2": ("[INST]", "[/INST]", "</s>"),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>",
        "<|start_header_id|>assistant<|end_header_id|>",
        "<|eot_id|>",
    ),
    "chatml": ("<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"),
    "phi-3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "internlm-2": ("<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"),
    "gemma": ("<start_of_turn>user", "<start_of_turn>model", "<end_of_turn>"),
    "gemma-3": ("<start_of_turn>user", "<start_of_turn>model", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]", "</s>"),
}
SYSTEM_MARKS = ("<<SYS>>", "<</SYS>>", "<|im_start|>system", "<|system|>")


def reader_of(template, **settings):
    tokenizer = tokenizer_of(template)
    return PromptReader(tokenizer, [tokenizer.convert_tokens_to_ids(IMAGE)], **settings)


def plain(template, text):
    """A text without special tokens, which are dropped from instructions."""
    tokens = sorted({*tokenizer_of(template).all_special_tokens, IMAGE}, key=len, reverse=True)
    return re.sub(r"\s+", " ", re.sub("|".join(map(re.escape, tokens)), " ", text)).strip()


def spelled(template, *parts):
    """Ids of a row, and its labels: every second part is learned."""
    tokenizer = tokenizer_of(template)
    ids, labels = [], []
    for part, learned in zip(parts, itertools.cycle([False, True]), strict=False):
        found = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += found
        labels += found if learned else [-100] * len(found)
    return torch.tensor([ids]), torch.tensor([labels])


def read(template, *parts, labels=False, **settings):
    """What is read, with blanks made equal; None where the row is refused."""
    ids, targets = spelled(template, *parts)
    try:
        (text,) = reader_of(template, **settings).read(ids, [0], labels=targets if labels else None)
    except MissingContextError as error:
        if "in two ways" not in str(error):
            raise
        return None
    return re.sub(r"\s+", " ", text)


def parts_of(template, turns):
    """A conversation, cut before and after each answer but the last, which is learned."""
    prompt = render(template, turns[:-1])
    text = render(template, turns, answer=False)
    assert text.startswith(prompt)
    return prompt, text[len(prompt) :]


@every_template
def test_a_question_with_one_mark_of_the_template(template):
    for mark in (*MARKS[template], *SYSTEM_MARKS, "</s>", IMAGE):
        question = f"who is the {mark} of the people?"
        wanted = plain(template, question)
        assert read(template, render(template, [("user", question)])) == wanted, mark
        prompt, answer = parts_of(template, [("user", question), ("assistant", YES)])
        assert read(template, prompt, answer, labels=True) == wanted, mark
        assert read(template, prompt, answer) in (wanted, None), mark
        # After an earlier turn, as the newest question.
        text = render(template, [("user", ONE), ("assistant", YES), ("user", question)])
        assert read(template, text, turns="last") == wanted, mark
        assert read(template, text) == f"{ONE} {wanted}", mark
        assert read(template, text, turns="first") == ONE, mark


@every_template
def test_generation__the_last_mark_of_an_answer_counts(template):
    question = f"who is the {MARKS[template][1]} of the people?"
    assert read(template, render(template, [("user", question)])) == plain(template, question)


@every_template
def test_a_question_with_two_marks__is_read_or_refused_but_never_cut(template):
    marks = [mark for mark in MARKS[template] if mark]
    for one, other in itertools.product(marks, repeat=2):
        question = f"is {one} or {other} meant?"
        wanted = plain(template, question)
        if template == "llava-hf" and (one, other) == ("ASSISTANT:", "USER:"):
            continue  # nothing ends an answer there, so this is a chat in every respect
        assert read(template, render(template, [("user", question)])) in (wanted, None), question
        prompt, answer = parts_of(template, [("user", question), ("assistant", YES)])
        assert read(template, prompt, answer, labels=True) in (wanted, None), question
        assert read(template, prompt, answer) in (wanted, None), question


@every_template
def test_an_answer_with_a_mark(template):
    for mark in (*MARKS[template], *SYSTEM_MARKS, IMAGE):
        turns = [("user", ONE), ("assistant", f"it is the {mark} of all."), ("user", TWO), ("assistant", YES)]
        prompt, answer = parts_of(template, turns[:2])
        assert read(template, prompt, answer, labels=True) == ONE, mark
        text = render(template, turns[:3])
        if template == "llava-hf" and mark == "USER:":
            continue  # nothing ends an answer there, so this is a chat in every respect
        assert read(template, text) in (f"{ONE} {TWO}", None), mark
        assert read(template, text, turns="last") == TWO, mark
        # With both answers learned.
        later, last = parts_of(template, turns)
        assert later.startswith(prompt)
        cut = len(prompt) + later[len(prompt) :].index("of all.") + len("of all.")
        assert read(template, prompt, later[len(prompt) : cut], later[cut:], last, labels=True) == f"{ONE} {TWO}", mark


@pytest.mark.parametrize("template", ["vicuna", "llama-2", "mistral"])
def test_marks_of_both_kinds_where_no_answer_has_ended__are_refused(template):
    start, answer, _ = MARKS[template]
    question = f"swap {answer} and {start} in it"
    assert read(template, render(template, [("user", question)])) is None
    prompt, learned = parts_of(template, [("user", question), ("assistant", YES)])
    assert read(template, prompt, learned, labels=True) == plain(template, question)


def test_a_system_prompt_that_spells_the_marks():
    system = "Between USER: and ASSISTANT: there is a blank."
    text = render("vicuna", [("system", system), ("user", ONE)])
    assert read("vicuna", text, system=system) == ONE


def test_turns_of_others__end_nothing():
    """A call of a tool, and its result, between two answers."""
    text = render("chatml", [("user", ONE), ("assistant", "look it up"), ("tool", "42"), ("user", TWO)])
    assert read("chatml", text) == f"{ONE} {TWO}"
    text = render("chatml", [("user", ONE), ("assistant", "look it up"), ("tool", "42"), ("assistant", YES)])
    assert read("chatml", text) == ONE
    text = render("chatml", [("user", ONE), ("tool", "42")], answer=False)
    assert read("chatml", text) == ONE
    assert read("chatml", render("chatml", [("user", ONE), ("user", TWO)])) == f"{ONE} {TWO}"


def test_an_answer_that_has_begun():
    assert read("vicuna", render("vicuna", [("user", ONE)]) + " It is") == ONE
    assert read("vicuna", render("vicuna", [("user", "who is the ASSISTANT: of it?")]) + " It is") is None
