"""The tokenizer: every word of the study, encoded and decoded."""

from __future__ import annotations

from study.data.scenes import make_scenes
from study.data.tasks import all_words, make_examples
from study.data.tokenizer import build_tokenizer, prompt


def test_questions_and_answers_survive_the_round_trip() -> None:
    tokenizer = build_tokenizer()
    for example in make_examples(make_scenes("test", 60)):
        for text in (example.question, example.answer):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_an_unknown_word_becomes_the_unknown_token() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]


def test_every_word_and_special_token_has_one_id() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(set(all_words())) + 7
    ids = tokenizer(prompt("where is the cat ?", 36)).input_ids
    assert len(ids) == 1 + 36 + 1 + 5 + 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 36


def test_the_chat_template_gives_the_prompt() -> None:
    tokenizer = build_tokenizer()
    turns = [{"role": "user", "content": "where is the cat ?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text).input_ids == tokenizer(prompt("where is the cat ?", 0)).input_ids
