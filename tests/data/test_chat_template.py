"""One prober for labels and for prompts: it finds the template, and the form of content that the template reads."""

import copy

import pytest

from covft.data import encode_conversation
from covft.data.broken import DataError
from covft.data.chat_template import ChatTemplate, any_of, round_trip
from covft.errors import ConfigError

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TEXT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
WRITTEN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
PARTS = TEXT.replace("m.content", "m.content[0].text")  # with text for content this is an error of the template
# With text for content these two write nothing in its place, or raise a TypeError.
SELECTED = TEXT.replace(
    "m.content", "(m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
)
ADDED = TEXT.replace("m.content", "(m.content + [])[0].text")


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (TEXT, None),
        ("{{ 'other' }}", TEXT),
        ({"tool_use": "{{ 'other' }}", "default": TEXT}, None),
        ({"first": TEXT, "second": "{{ 'other' }}"}, None),
        ({"default": "{{ 'other' }}", "chat": TEXT}, "chat"),
        ({"default": "{{ 'other' }}"}, TEXT),
        ("{{ 'other' }}", {"default": TEXT}),
    ],
    ids=["own", "given", "default", "first", "by name", "given over several", "several given"],
)
def test_the_template_is_found(qwen, own, given):
    tokenizer = with_template(qwen, own)
    assert ChatTemplate(tokenizer, given).render(MESSAGES) == WRITTEN
    assert ChatTemplate(tokenizer, given).template == TEXT
    if not isinstance(given, dict):
        _, labels = encode_conversation(tokenizer, MESSAGES, chat_template=given)
        assert tokenizer.decode(labels[labels != -100]) == "So.<|im_end|>"


@pytest.mark.parametrize("own", [None, "", {}])
def test_no_template(qwen, own):
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatTemplate(with_template(qwen, own))


@pytest.mark.parametrize("template", [TEXT, PARTS, SELECTED, ADDED])
def test_contents_take_the_form_that_the_template_reads(qwen, template):
    assert ChatTemplate(qwen, template).render(MESSAGES) == WRITTEN
    ids, labels = encode_conversation(qwen, MESSAGES, chat_template=template)
    assert qwen.decode(ids) == WRITTEN
    assert qwen.decode(labels[labels != -100]) == "So.<|im_end|>"


def test_parts_stay_parts(qwen):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, MESSAGES[1]]
    assert ChatTemplate(qwen, PARTS).render(messages) == WRITTEN


def test_generation_marks_of_a_template_that_reads_parts(qwen):
    marked = "{% generation %}{{ m.content[0].text | replace('hm', '') + '<|im_end|>' }}{% endgeneration %}"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        + marked
        + "{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
    )
    messages = [MESSAGES[0], {"role": "assistant", "content": "hmSo."}]
    _, labels = encode_conversation(with_template(qwen, {"default": template}), messages)
    assert qwen.decode(labels[labels != -100]) == "So.<|im_end|>"


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ nothing( }}", "{{ 1 + messages }}"])
def test_what_the_template_cannot_render_is_a_data_error(qwen, template):
    with pytest.raises(DataError, match="refuses the conversation"):
        ChatTemplate(qwen, template).render(MESSAGES)


def test_pieces(qwen):
    template = ChatTemplate(qwen, TEXT + "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}")
    start, between, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    assert template.pieces(MESSAGES, ["Why?", "So."]) == [start, between, end]
    assert template.pieces(MESSAGES, ["So."]) == [f"{start}Why?{between}", end]
    assert template.pieces(MESSAGES, ["Why?", "So."], prompt=True) == [start, between, f"{end}<|im_start|>"]
    assert template.pieces(MESSAGES, ["Why?", "So."], spelled=True) == [start, between, end]
    assert template.pieces(MESSAGES, ["So.", "Why?"]) is None  # not in this order
    assert template.pieces(MESSAGES, ["im"]) is None  # not once
    assert template.pieces(MESSAGES, ["Where?"]) is None


def test_pieces_as_a_tokenizer_spells_them(vicuna):
    def lowered(text, **options):
        return vicuna(text.lower(), **options)

    class Uncased:
        apply_chat_template, decode, __call__ = vicuna.apply_chat_template, vicuna.decode, staticmethod(lowered)

    template = ChatTemplate(Uncased(), "{% for m in messages %}{{ m.role.upper() + ': ' + m.content }}{% endfor %}")
    words = [{"role": "user", "content": "zebra"}]
    assert template.pieces(words, ["zebra"]) == ["USER: ", ""]
    assert template.pieces(words, ["zebra"], spelled=True) == ["user: ", ""]
    assert round_trip(Uncased(), "USER: a") == "user: a"


def test_any_of():
    import re

    assert re.findall(any_of(["a", "a+", "", "b"]), "aa+b") == ["a", "a+", "b"]
    assert re.search(any_of([]), "text") is None
