"""Instructions without what only asks for a form of answer, on prompts of LLaVA-1.5 and of evaluation engines."""

import hashlib
import itertools
import json
import re

import pytest
import torch

import covft
from covft.data import LlavaRows, clean_instruction, instructions_of
from covft.testing import HashTextEncoder, ToyViT
from covft.text.cleaning import CONTENT_RULES, ENGINE_RULES, FORMAT_RULES, RULES_VERSION, engine_sentences

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
SELECT = "Please select the correct answer from the options above. "
NOTE = "Note: You only need to respond with A, B, C without providing any additional information.\n"
ICONS = "Given a set of images and a question, please provide the answer to the question.\nQuestion: "
# As lmms-eval and VLMEvalKit build them.
ENGINES = [
    (f"Hint: Look.\nQuestion: Which is it?\nOptions:\nA. a cup\nB. a dog\n{SELECT}\n", "Hint: Look.\nWhich is it?"),
    ("What is it?\nPlease directly provide a short answer to the question. ", "What is it?"),
    (
        "Please describe this image in general. Directly provide the description, do not include prefix like "
        '"This image depicts". ',
        "Please describe this image in general.",
    ),
    ("What is it?\nAnswer the question directly.", "What is it?"),
    ("图中是什么?\n请直接回答问题。", "图中是什么?"),
    (f"What is it? There are several options:\nA. a cup\nB. a dog\n{LETTER}", "What is it?"),
    (
        "图中是什么? There are several options:\nA. 杯子\nB. 狗\n请直接使用所提供的选项字母作为答案回答。",
        "图中是什么?",
    ),
    (f"{NOTE}\nHow many? Select from the following choices.\n(A) 1\n(B) 2\n(C) 3", "How many?"),
    (
        "Where?\nA. Left\nB. Right\n"
        "Please answer directly with only the letter of the correct option and nothing else.",
        "Where?",
    ),
    ("How many cars? Please answer directly with a single word or number.", "How many cars?"),
    (
        f"{ICONS}Which?\nOptions:\nA. a\nB. b\nPlease answer with the option letter from the given choices directly.",
        "Which?",
    ),
    (f"{ICONS}How many?\nPlease answer the question using a single word or phrase.", "How many?"),
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


@pytest.mark.parametrize(("text", "rest"), [*PROMPTS, *ENGINES])
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
        SELECT,
        "Question:",
    ]
    for chosen in itertools.permutations(parts, 3):
        for between in ("\n", " ", "\n\n"):
            text = between.join(chosen)
            cleaned = clean_instruction(text)
            assert cleaned.strip(), text
            assert clean_instruction(cleaned) == cleaned, text
            assert len(cleaned) <= len(text)


def test_every_rule_has_an_example():
    for pattern, name in (*CONTENT_RULES, *FORMAT_RULES, *ENGINE_RULES):
        assert name
        assert any(re.search(pattern, text, re.IGNORECASE | re.MULTILINE) for text, _ in [*PROMPTS, *ENGINES]), name


def test_sentences_that_only_engines_add():
    assert all(engine_sentences(text) for text, _ in ENGINES)
    assert not any(engine_sentences(text) for text, _ in PROMPTS), "LLaVA-1.5's own are in its training mixture"


def test_other_rules_have_another_version():
    """Encoders are saved with the version; whoever changes a rule raises it, and writes its digest here."""
    digest = hashlib.sha256(repr((CONTENT_RULES, FORMAT_RULES, ENGINE_RULES)).encode()).hexdigest()[:16]
    assert (RULES_VERSION, digest) == (2, "e18013f68fc131eb")


def test_other_rules_than_in_training_are_warned_about(tmp_path):
    torch.manual_seed(0)
    vit = ToyViT()
    plain = ToyViT()
    plain.load_state_dict(vit.state_dict())
    covft.wrap(vit, HashTextEncoder(8), instructions="clean").save_pretrained(tmp_path)
    path = tmp_path / "covft_config.json"
    config = json.loads(path.read_text())
    assert config.pop("cleaning") == RULES_VERSION
    path.write_text(json.dumps(config))  # as before there was a second version
    with pytest.warns(UserWarning, match=r"version 1 of the rules; here they are those of version 2"):
        covft.load(tmp_path, plain, HashTextEncoder(8))


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
