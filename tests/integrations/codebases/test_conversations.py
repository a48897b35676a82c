"""Readers for prompts that are written by a codebase's own conversation objects."""

import sys

import pytest
import torch

from covft.errors import ConfigError, MissingContextError
from covft.integrations.codebases.conversations import prompt_reader
from tests.helpers.codebases import STANDINS, forget, tokenizer_for

pytest.importorskip("transformers")


@pytest.fixture
def conversations(monkeypatch):
    monkeypatch.syspath_prepend(str(STANDINS))
    forget("llava")
    import llava.conversation

    yield llava.conversation.conv_templates
    forget("llava")
    assert "llava" not in sys.modules


def ids_of(tokenizer, text):
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def test_the_conversation_is_left_as_it_was(conversations):
    conversation, tokenizer = conversations["v0"], tokenizer_for("v0")
    before = (conversation.messages, conversation.system, conversation.get_prompt())
    reader = prompt_reader(tokenizer, conversation)
    assert (conversation.messages, conversation.system, conversation.get_prompt()) == before
    assert reader.marks.start == ("###Human:",)
    # Turns that the conversation begins with are part of its prompts, and of what is read.
    assert reader.read(ids_of(tokenizer, conversation.get_prompt() + "Human: where?###Assistant:"), [0]) == [
        "What? where?"
    ]


def test_a_template_by_name_or_as_it_is():
    tokenizer = tokenizer_for("mpt")
    prompt = ids_of(tokenizer, "<|im_start|>user\nwhat is that?<|im_end|>\n<|im_start|>assistant\na cup<|im_end|>\n")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for conversation in ("chatml", template):
        assert prompt_reader(tokenizer, conversation).read(prompt, [0]) == ["what is that?"]
    tokenizer.chat_template = template
    assert prompt_reader(tokenizer, None).read(prompt, [0]) == ["what is that?"]
    with pytest.raises(ConfigError, match="not known") as error:
        prompt_reader(tokenizer, "vicuna_v7")
    assert "vicuna_v1" in str(error.value)


def test_prompts_without_users_are_an_error_when_they_are_read(conversations):
    tokenizer = tokenizer_for("plain")
    for conversation in (conversations["plain"], "plain"):
        reader = prompt_reader(tokenizer, conversation)
        assert reader.marks is None
        with pytest.raises(MissingContextError, match=r"does not mark|cannot be probed"):
            reader.read(ids_of(tokenizer, "a cup"), [0])
