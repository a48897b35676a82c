"""Removes from instructions what asks for a form of answer, not for something to see."""

from __future__ import annotations

import re

from covft.utils.arguments import check_kinds

# Parts that carry data of one sample. Pattern, and where it comes from.
CONTENT_RULES: tuple[tuple[str, str], ...] = (
    # A-OKVQA and ScienceQA in LLaVA-1.5's training mixture, and MMBench and SEED-Bench in its evaluation: lines of
    # options from A on, at least two.
    # VLMEvalKit has a line "Options:" before them.
    (
        r"^(?:[ \t]*options:[ \t]*\n)?"
        r"[ \t]*(?:\(A\)|A[.):])[ \t]+[^\n]*\n(?:[ \t]*(?:\([B-Z]\)|[B-Z][.):])[ \t]+[^\n]*(?:\n|\Z))+",
        "answer options, a line each",
    ),
    # ScienceQA in LLaVA's evaluation: all options in a line.
    (r"^[ \t]*(?:options|choices):[ \t]*(?:\(?A[.):])[^\n]*(?:\n|\Z)", "answer options in a line"),
    # TextVQA and TextCaps in LLaVA-1.5's training mixture and evaluation.
    (r"^[ \t]*reference OCR token:[^\n]*(?:\n|\Z)", "OCR tokens"),
    # RefCOCO and Visual Genome in LLaVA-1.5's mixture; InternVL and Qwen-VL with marks around.
    (
        r"(?:<box>|<\|box_start\|>)\s*[\[(][\d\s.,()\[\]]*[\])]\s*(?:</box>|<\|box_end\|>)",
        "bounding boxes between marks",
    ),
    (r"\[\s*\d+(?:\.\d+)?(?:\s*,\s*\d+(?:\.\d+)?){3}\s*\]", "bounding boxes"),
    (r"</?ref>|<\|object_ref_(?:start|end)\|>", "marks around what a box is of"),
)
# Sentences that ask for a form of answer.
FORMAT_RULES: tuple[tuple[str, str], ...] = (
    # VQAv2, GQA, OKVQA and OCR-VQA in LLaVA-1.5's training mixture, most of its and InternVL's evaluation.
    (r"answer the question using a single word or phrase\.?", "short answers"),
    # A-OKVQA and ScienceQA in LLaVA-1.5's training mixture; MMBench and SEED-Bench in its evaluation.
    (r"answer with the option['\u2019]s letter from the given choices directly\.?", "options"),
    # MMBench-CN in LLaVA-1.5's evaluation.
    (r"请直接回答选项字母。?", "options, in Chinese"),
    # TextCaps in LLaVA-1.5's training mixture.
    (r"provide a one-sentence caption for the provided image\.?", "captions"),
    # VizWiz in LLaVA-1.5's evaluation.
    (
        r"when the provided information is insufficient, respond with ['\u2018\"]unanswerable['\u2019\"]\.?",
        "questions without an answer",
    ),
    # MME, whose questions end with it.
    (r"please answer yes or no\.?", "yes or no"),
)
# What evaluation engines and their data sets put around a question, and LLaVA-1.5's training mixture does not have.
ENGINE_RULES: tuple[tuple[str, str], ...] = (
    (r"^[ \t]*question:[ \t]*", "VLMEvalKit, multiple choice; lmms-eval, IconQA"),
    (r"please select the correct answer from the options above\.?", "VLMEvalKit, multiple choice"),
    (r"please directly provide a short answer to the question\.?", "VLMEvalKit, PathVQA"),
    (
        r"directly provide the description, do not include prefix like \"this image depicts\"\.?",
        "VLMEvalKit, COCO captions",
    ),
    (r"answer the question directly\.?", "VLMEvalKit's LLaVA"),
    (r"请直接回答问题。?", "VLMEvalKit's LLaVA, in Chinese"),
    (r"there are several options:", "lmms-eval, MMBench"),
    (r"请直接使用所提供的选项字母作为答案回答。?", "lmms-eval, MMBench in Chinese"),
    (
        r"note: you only need to respond with [A-Z](?:, [A-Z])* without providing any additional information\.?",
        "lmms-eval, CV-Bench",
    ),
    (r"select from the following choices\.?", "CV-Bench"),
    (r"please answer directly with only the letter of the correct option and nothing else\.?", "RealWorldQA, options"),
    (r"please answer directly with a single word or number\.?", "RealWorldQA, short answers"),
    (r"given a set of images and a question, please provide the answer to the question\.?", "lmms-eval, IconQA"),
    (r"(?:please )?answer with the option letter from the given choices directly\.?", "lmms-eval, IconQA, options"),
    (r"please answer the question using a single word or phrase\.?", "lmms-eval, IconQA, short answers"),
)
# Of the rules, saved with an encoder that reads cleaned instructions. 1 had no ENGINE_RULES.
RULES_VERSION = 2

_CONTENT = [re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern, _ in CONTENT_RULES]
_ENGINE = [re.compile(rf"(?<!\w){pattern}", re.IGNORECASE | re.MULTILINE) for pattern, _ in ENGINE_RULES]
_FORMAT = [re.compile(rf"(?<!\w){pattern}", re.IGNORECASE) for pattern, _ in FORMAT_RULES]


@check_kinds
def clean_instruction(text: str) -> str:
    r"""Remove format suffixes, answer options, OCR tokens and bounding boxes from an instruction.

    The rules are those of LLaVA-1.5's training and evaluation prompts (`CONTENT_RULES`, `FORMAT_RULES`), and of what
    lmms-eval and VLMEvalKit add (`ENGINE_RULES`), so that a question is the same text in training and in evaluation.
    What they do not match stays as it is, and cleaning twice changes nothing more.

    Args:
        text: An instruction.

    Returns:
        The rest. If only sentences about the form of the answer are there, these stay; if nothing is left at all, the
        instruction itself. Never empty unless `text` is.

    Example:
        >>> clean_instruction("What is it?\nAnswer the question using a single word or phrase.")
        'What is it?'
    """
    without_content = _remove(text, _CONTENT)
    if not _says_something(without_content):
        without_content = text
    rest = _remove(without_content, [*_CONTENT, *_ENGINE, *_FORMAT])
    return rest if _says_something(rest) else without_content


@check_kinds
def engine_sentences(text: str) -> list[str]:
    """Return what an evaluation engine has put around a question, which training can hardly have had.

    Args:
        text: An instruction.

    Example:
        >>> engine_sentences("Is it red? Please answer directly with a single word or number.")
        ['Please answer directly with a single word or number.']
    """
    return [found[0].strip() for rule in _ENGINE if (found := rule.search(text))]


def _remove(text: str, rules: list[re.Pattern[str]]) -> str:
    while True:
        found = text
        for rule in rules:
            found = rule.sub("", found)
        if found == text:
            return text
        text = re.sub(r"[ \t]*\n\s*", "\n", re.sub(r"[ \t]{2,}", " ", found)).strip()


def _says_something(text: str) -> bool:
    return re.search(r"\w", text) is not None
