"""Instructions without what only asks for a form of answer, on prompts of LLaVA-1.5."""

import itertools
import json
import re

import pytest
import torch

import covft
from covft.data import LlavaRows, clean_instruction, instructions_of
from covft.testing import HashTextEncoder, ToyViT
from covft.text.cleaning import CONTENT_RULES, FORMAT_RULES

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CURLY = LETTER.replace("'", "\u2019")
CAPTION = "Provide a one-sentence caption for the provided image."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
REGION = "Please provide the bounding box coordinate of the region this sentence describes: the red cup."
PROMPTS = [
    (f"What is left of the cup?\n{SHORT}", "What is left of the cup?"),
    (f"what is it?\n{SHORT} And that?\n{SHORT}", "what is it?\nAnd that?"),
    (f"Is it red? {SHORT.lower()}", "Is it red?"),
    (f"What does it say?\n{UNANSWERABLE}\n{SHORT}", "What does it say?"),
    (f"Which is it?\nA. a cup\nB. a dog\nC. a man\nD. none\n{LETTER}", "Which is it?"),
    (f"Which is it?\nA. a cup\nB. a dog\n{LETTER} Where is it?\n{SHORT}", "Which is it?\nWhere is it?"),
    (f"Which is it?\n(A) a cup\n(B) a dog\n{CURLY}", "Which is it?"),
    ("Which is it?\nContext: N/A\nOptions: (A) a cup (B) a dog", "Which is it?\nContext: N/A"),
    ("图中是什么?\nA. 杯子\nB. 狗\n请直接回答选项字母。", "图中是什么?"),
    (f"What is written?\nReference OCR token: STOP, 12, THE\n{SHORT}", "What is written?"),
    (f"{CAPTION}\nReference OCR token: STOP, 12", CAPTION),
    (CAPTION, CAPTION),
    (SHORT, SHORT),
    ("Is there a dog? Please answer yes or no.", "Is there a dog?"),
    (
        "Provide a short description for this region: [0.31, 0.2, 0.5, 0.67]",
        "Provide a short description for this region:",
    ),
    ("What is <ref>the cup</ref><box>[[10, 20, 300, 400]]</box> made of?", "What is the cup made of?"),
    ("[0.31, 0.2, 0.5, 0.67]", "[0.31, 0.2, 0.5, 0.67]"),
]
UNTOUCHED = [
    "",
    " what is it?  ",
    REGION,
    "What is option A. and what is B. in it?",
    "A. Smith stands where?",
    "Is [1, 2, 3] a list?",
    "Answer the question.",
    "Count them.\n\nThen name them.",
    "Where is the reference OCR token: here?",
]


@pytest.mark.parametrize(("text", "rest"), PROMPTS)
def test_what_is_removed(text, rest):
    assert clean_instruction(text) == rest
    assert clean_instruction(rest) == rest


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_stays_as_it_is(text):
    assert clean_instruction(text) == text


def test_any_mixture__is_never_empty_and_cleaned_once():
    parts = [
        SHORT,
        LETTER,
        CAPTION,
        "A. one\nB. two",
        "Reference OCR token: x",
        "[0.1, 0.2, 0.3, 0.4]",
        "what?",
        "<ref>",
    ]
    for chosen in itertools.permutations(parts, 3):
        for between in ("\n", " ", "\n\n"):
            text = between.join(chosen)
            cleaned = clean_instruction(text)
            assert cleaned.strip(), text
            assert clean_instruction(cleaned) == cleaned, text
            assert len(cleaned) <= len(text)


def test_every_rule_has_an_example():
    for pattern, name in (*CONTENT_RULES, *FORMAT_RULES):
        assert name
        assert any(re.search(pattern, text, re.IGNORECASE | re.MULTILINE) for text, _ in PROMPTS), name


def test_the_setting__holds_for_every_text_and_is_saved(tmp_path):
    torch.manual_seed(0)
    texts = HashTextEncoder(8)
    vit = ToyViT()
    plain = ToyViT()
    plain.load_state_dict(vit.state_dict())
    encoder = covft.wrap(vit, texts, instructions="clean")
    long, short = f"What is it?\n{SHORT}", "What is it?"
    assert torch.equal(encoder.encode_text(long), texts.encode([short]))
    assert torch.equal(encoder.encode_text([long, short])[0], encoder.encode_text([long, short])[1])
    encoder.save_pretrained(tmp_path)
    again = covft.load(tmp_path, plain, texts)
    assert again.covft_config.instructions == "clean"
    assert torch.equal(again.encode_text(long), texts.encode([short]))
    other = covft.wrap(ToyViT(), texts)
    assert torch.equal(other.encode_text(long), texts.encode([long]))  # the default


def test_instructions_of_a_data_set__for_precomputed_features(tmp_path):
    turns = [{"from": "human", "value": f"<image>\nWhat is it?\n{SHORT}"}, {"from": "gpt", "value": "A cup"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"image": "a.jpg", "conversations": turns}]))
    assert list(instructions_of(LlavaRows(path), clean=True)) == ["What is it?"]
    assert list(instructions_of(LlavaRows(path))) == [f"What is it?\n{SHORT}"]
