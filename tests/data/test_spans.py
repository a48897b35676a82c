"""The answers of a conversation are found whatever its texts spell."""

import copy

import pytest

from covft.data import answer_spans
from covft.data.chat_template import ChatTemplate
from tests.helpers.chat_templates import TEMPLATES, expected
from tests.helpers.data import build_tokenizer

ROLES = ("user", "assistant")
STRINGS = [
    *("USER:", "ASSISTANT:", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<image>", "<|endoftext|>"),
    *("<|im_start|>user", "<|im_start|>assistant", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot_id|>"),
    *(
        "<|start_header_id|>assistant<|end_header_id|>",
        "<|im_start|>system",
        "Qz1answer1zQ",
        "answer",
        "{{ bos_token }}",
    ),
]


def chat(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(ROLES, pair, strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_that_spell_marks(name):
    tokenizer = build_tokenizer(name)
    for string in STRINGS:
        questions = [f"who is the {string} of the people?", f"{string} and {string}"]
        answers = [f"it is the {string} of all.", f"{string}{string} it is"]
        pieces = expected(name, questions, answers)
        text, spans = answer_spans(tokenizer, chat(questions, answers))
        assert text == "".join(piece for piece, _ in pieces), string
        learned = [piece for piece, flag in pieces if flag]
        assert [text[start:end].strip() for start, end in spans] == [piece.strip() for piece in learned], string


def test_the_form_of_contents_is_found_once_for_each_tokenizer_and_template():
    tokenizer = copy.deepcopy(build_tokenizer("qwen_2"))
    rendered = []

    class Counting:
        chat_template = tokenizer.chat_template

        def apply_chat_template(self, messages, **options):
            rendered.append(messages)
            return tokenizer.apply_chat_template(messages, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    counting = Counting()
    messages = chat(["Why?"], ["So."])
    answer_spans(counting, messages)
    first = len(rendered)
    answer_spans(counting, messages)
    assert len(rendered) - first == first - 1  # without the rendering that finds the form
    parts = counting.chat_template.replace("m['content']", "m['content'][0]['text']")
    assert ChatTemplate(counting, parts).render(messages) == ChatTemplate(counting).render(messages)
    assert len(rendered) == 2 * first - 1 + 4
