"""A word-level tokenizer for the study's questions and answers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from study.data.tasks import all_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<user>", "<answer>")
BLANK = "blank"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else '<answer> ' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def vocabulary() -> list[str]:
    """Return the special tokens and the words, in the order of their ids."""
    return [*SPECIAL, *sorted(set(all_words()))]


def vocabulary_sha256() -> str:
    """Return a digest of the vocabulary, by which weights know theirs."""
    return hashlib.sha256(" ".join(vocabulary()).encode()).hexdigest()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word and left padding, which batched generation needs.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.decode(tokenizer("where is the cat ?").input_ids)
        'where is the cat ?'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>", "<user>", "<answer>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def prompt(question: str, image_tokens: int) -> str:
    """Return the text before the answer; an empty question leaves only the image."""
    return " ".join(["<bos>", *["<image>"] * image_tokens, "<user>", *question.split(), "<answer>"])
