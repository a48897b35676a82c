"""Only the answers and the tokens that end them are learned: token by token, for every template."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covft.data import CHAT_TEMPLATES, answer_spans, encode_conversation, instruction_text, to_messages
from covft.data.broken import DataError
from covft.data.conversation import label_spans
from covft.errors import ConfigError
from tests.helpers.chat_templates import TEMPLATES, expected
from tests.helpers.data import RECORDS, build_tokenizer, talk


def token_bytes(tokenizer, token_id):
    """What a token stands for, from its name alone."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    name = tokenizer.convert_ids_to_tokens(token_id)
    if name in tokenizer.all_special_tokens:
        return name.encode(), True
    if name.startswith("<0x") and len(name) == 6:
        return bytes([int(name[3:5], 16)]), False
    if "▁" in tokenizer.get_vocab():
        return name.replace("▁", " ").encode(), False
    back = {char: byte for byte, char in bytes_to_unicode().items()}
    return bytes(back[char] for char in name), False


def expected_labels(tokenizer, ids, pieces):
    """Walk through the expected text byte by byte beside the tokens; no offsets of any library."""
    text = b"".join(piece.encode() for piece, _ in pieces)
    learned = [flag for piece, flag in pieces for _ in piece.encode()]
    labels, at, after_special = [], 0, True
    for token_id in ids:
        token, special = token_bytes(tokenizer, token_id)
        # SentencePiece puts a blank before each stretch of text; a token by itself, it belongs to what follows.
        if after_special and not special and token.startswith(b" ") and "▁" in tokenizer.get_vocab():
            token = token[1:]
        assert text[at : at + len(token)] == token
        inside = any(learned[at : at + max(len(token), 1)])
        labels.append(token_id if inside else -100)
        at, after_special = at + len(token), special
    assert at == len(text)
    return labels


def chat(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return [
        message
        for question, answer in pairs
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


QUESTIONS = ["<image>\nWhat is left of the cup?", "And right of it?", "Über was — 火?"]
ANSWERS = ["A spoon.", "Two dogs, as in the question: And right of it?", "Nichts 🚀"]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_only_answers_are_learned(model, turns):
    name, tokenizer = model
    questions, answers = QUESTIONS[:turns], ANSWERS[:turns]
    pieces = expected(name, questions, answers)
    ids, labels = encode_conversation(tokenizer, chat(questions, answers))
    assert tokenizer(("").join(text for text, _ in pieces), add_special_tokens=False)["input_ids"] == ids.tolist()
    assert labels.tolist() == expected_labels(tokenizer, ids.tolist(), pieces)
    runs = decode_runs(tokenizer, labels)
    assert [run.strip() for run in runs] == [text.strip() for text, flag in pieces if flag]


def decode_runs(tokenizer, labels):
    runs, run = [], []
    for label in [*labels.tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


words = st.text(alphabet="ab :.?\n\t[]<>|é火🚀'", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.sampled_from(list(TEMPLATES)))
def test_whatever_is_said_only_answers_are_learned(turns, name):
    tokenizer = build_tokenizer(name)
    questions, answers = [question for question, _ in turns], [answer for _, answer in turns]
    pieces = expected(name, questions, answers)
    ids, labels = encode_conversation(tokenizer, chat(questions, answers))
    assert labels.tolist() == expected_labels(tokenizer, ids.tolist(), pieces)


class Slow:
    """A tokenizer that does not tell where its tokens stand."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, add_special_tokens):
        return self._tokenizer(text, add_special_tokens=add_special_tokens)


def test_a_slow_tokenizer_gives_the_same_labels(model):
    _, tokenizer = model
    messages = chat(QUESTIONS, ANSWERS)
    fast, slow = encode_conversation(tokenizer, messages), encode_conversation(Slow(tokenizer), messages)
    assert torch.equal(fast.input_ids, slow.input_ids)
    assert torch.equal(fast.labels, slow.labels)


def test_a_slow_tokenizer_with_a_blank_before_the_answer(vicuna):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    messages = chat(QUESTIONS, ANSWERS)
    fast = encode_conversation(vicuna, messages, chat_template=template)
    slow = encode_conversation(Slow(vicuna), messages, chat_template=template)
    assert vicuna.convert_ids_to_tokens(fast.labels[fast.labels != -100])[0] == "▁A"
    assert torch.equal(fast.labels, slow.labels)


def test_tokens_without_width_belong_to_what_follows():
    class Stub:
        is_fast = True

        def __call__(self, text, **options):
            places = [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4)]
            return {"input_ids": list(range(7)), "offset_mapping": places}

    labels = label_spans(Stub(), "abcd", [(1, 3)]).labels
    assert labels.tolist() == [-100, 1, 2, 3, 4, -100, -100]


def test_a_token_over_the_boundary_is_refused(qwen):
    text = "ab"
    with pytest.raises(DataError, match="partly outside an answer"):
        label_spans(_Merging(), text, [(1, 2)])
    with pytest.raises(DataError, match="depend on the text after them"):
        label_spans(_Merging(is_fast=False), text, [(1, 2)])


class _Merging:
    """Reads "ab" as one token and "a" as another."""

    def __init__(self, is_fast=True):
        self.is_fast = is_fast

    def __call__(self, text, **options):
        return {"input_ids": [len(text)], "offset_mapping": [(0, len(text))]}


# ------------------------------------------------------------------------------------- covft's templates


@pytest.mark.parametrize(("ours", "theirs"), [("vicuna_v1", "vicuna"), ("internlm2", "internlm_2"), ("phi_3", "phi_3")])
def test_packaged_templates_write_what_the_models_read(ours, theirs):
    tokenizer = build_tokenizer(theirs)
    own, _ = answer_spans(tokenizer, chat(QUESTIONS, ANSWERS), chat_template=CHAT_TEMPLATES[ours])
    text = "".join(piece for piece, _ in expected(theirs, QUESTIONS, ANSWERS))
    assert own == text.removesuffix("<|endoftext|>")  # Phi-3's own ends the text after the last turn


def test_packaged_chatml(qwen):
    messages = [{"role": "system", "content": "You are a helpful assistant."}, *chat(QUESTIONS, ANSWERS)]
    text, _ = answer_spans(qwen, messages, chat_template=CHAT_TEMPLATES["chatml"])
    assert text == "".join(piece for piece, _ in expected("qwen_2", QUESTIONS, ANSWERS))


def test_plain_learns_caption_and_line_break(vicuna):
    messages = [{"role": "user", "content": "<image>" * 3}, {"role": "assistant", "content": "a red dog"}]
    ids, labels = encode_conversation(vicuna, messages, chat_template=CHAT_TEMPLATES["plain"], end_of_turn="\n")
    assert vicuna.convert_ids_to_tokens(ids[:4]) == ["<s>", "<image>", "<image>", "<image>"]
    assert (labels[:4] == -100).all()
    assert torch.equal(labels[4:], ids[4:])
    assert vicuna.decode(ids[4:]) == "a red dog\n"
    with pytest.raises(ConfigError, match="never stop"):
        encode_conversation(vicuna, messages, chat_template=CHAT_TEMPLATES["plain"])


# ------------------------------------------------------------------------------- templates that are harder

# Thoughts of earlier answers are dropped, so what is written depends on the answer.
THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>assistant\\n' }}MARK{{ m.content.split('</think>')[-1] + '<|im_end|>' }}END{{ '\\n' }}"
    "{% endif %}{% endfor %}"
)


def test_generation_marks_decide_where_probing_cannot(qwen):
    messages = chat(["Why?", "When?"], ["<think>hm</think>So.", "<think>hm</think>Then."])
    with pytest.raises(ConfigError, match="cannot be found") as error:
        encode_conversation(qwen, messages, chat_template=THINKING.replace("MARK", "").replace("END", ""))
    assert "{% generation %}" in str(error.value)
    marked = THINKING.replace("MARK", "{% generation %}").replace("END", "{% endgeneration %}")
    ids, labels = encode_conversation(qwen, messages, chat_template=marked)
    pieces = [
        ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", False),
        ("So.<|im_end|>", True),
        ("\n<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Then.<|im_end|>", True),
        ("\n", False),
    ]
    assert labels.tolist() == expected_labels(qwen, ids.tolist(), pieces)


def test_marks_in_the_wrong_place_are_an_error(qwen):
    around_nothing = THINKING.replace("MARK", "{% generation %}{% endgeneration %}").replace("END", "")
    with pytest.raises(ConfigError, match="do not enclose"):
        encode_conversation(qwen, chat(["Why?"], ["<think>hm</think>So."]), chat_template=around_nothing)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content + '<|im_end|>' }}",  # forgets earlier turns
        "{% for m in messages %}{{ m.content + m.content + '<|im_end|>' }}{% endfor %}",  # repeats
        "{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}",  # rewrites
        "{{ '<|im_start|>' }}",
        # adds something to some answers
        "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if 'dogs' in messages[-1].content %}!{% endif %}",
    ],
)
def test_answers_that_cannot_be_found_are_an_error(qwen, template):
    with pytest.raises(ConfigError, match="cannot be found"):
        encode_conversation(qwen, chat(QUESTIONS[:2], ANSWERS[:2]), chat_template=template)


def test_a_template_without_end_of_turn_is_an_error_until_told(vicuna):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    messages = chat(["Why?", "When?"], ["So.", "Then."])
    with pytest.raises(ConfigError, match="never stop"):
        encode_conversation(vicuna, messages, chat_template=template)
    ids, labels = encode_conversation(vicuna, messages, chat_template=template, end_of_turn="")
    pieces = [("user: Why? assistant: ", False), ("So.", True), (" user: When? assistant: ", False), ("Then.", True)]
    assert labels.tolist() == expected_labels(vicuna, ids.tolist(), [*pieces, (" ", False)])


def test_marks_do_not_excuse_a_template_that_never_stops(vicuna):
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}"
        "{% if m.role == 'user' %}{{ m.content + ' ' }}"
        "{% else %}{% generation %}{{ m.content + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="never stop"):
        encode_conversation(vicuna, chat(["Why?"], ["So."]), chat_template=template)


def test_an_end_that_not_every_turn_has_is_an_error(qwen):
    template = "{% for m in messages %}{{ m.content + ('<|im_end|>' if loop.last else '<|endoftext|>') }}{% endfor %}"
    with pytest.raises(ConfigError, match="Not every answer"):
        encode_conversation(qwen, chat(["Why?", "When?"], ["So.", "Then."]), chat_template=template)


def test_what_generation_would_have_to_write_is_learned(qwen):
    # Without thoughts the template writes empty ones, which the prompt for an answer does not hold.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + ('<t></t>' if m.role == 'assistant' else '') "
        "+ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    ids, labels = encode_conversation(qwen, chat(["Why?"], ["So."]), chat_template=template)
    prompt = ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", False)
    pieces = [prompt, ("<t></t>So.<|im_end|>", True), ("\n", False)]
    assert labels.tolist() == expected_labels(qwen, ids.tolist(), pieces)


def test_an_answer_is_learned_whole_where_the_prompt_gives_its_first_word(qwen):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<t>' }}{% endif %}"
    )
    ids, labels = encode_conversation(qwen, chat(["Why?"], ["<t>So."]), chat_template=template)
    prompt = ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", False)
    assert labels.tolist() == expected_labels(qwen, ids.tolist(), [prompt, ("<t>So.<|im_end|>", True), ("\n", False)])


def test_the_name_of_the_role_is_not_learned_by_a_template_without_generation_prompt(qwen):
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    ids, labels = encode_conversation(qwen, chat(["Why?"], ["So."]), chat_template=template)
    prompt = ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", False)
    assert labels.tolist() == expected_labels(qwen, ids.tolist(), [prompt, ("So.<|im_end|>", True), ("\n", False)])


def test_no_template_names_a_way_out(vicuna):
    import copy

    bare = copy.deepcopy(vicuna)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template") as error:
        encode_conversation(bare, chat(["Why?"], ["So."]))
    assert "CHAT_TEMPLATES" in str(error.value)


def test_what_the_template_refuses_is_a_broken_row():
    messages = [{"role": "system", "content": "Be brief."}, *chat(["Why?"], ["So."])]
    with pytest.raises(DataError, match="must alternate"):
        encode_conversation(build_tokenizer("mistral"), messages)


# -------------------------------------------------------------------------------------- the instruction


def test_instruction_text():
    row = {"image": "a", "conversations": talk("<image>\nWhat is it?", "A <b>.", "Where?\n", "There.", "Sure?", "Yes.")}
    assert instruction_text(row) == "What is it? Where? Sure?"
    assert instruction_text(row, "first") == "What is it?"
    assert instruction_text(row, "last") == "Sure?"
    assert instruction_text(row["conversations"]) == "What is it? Where? Sure?"
    assert instruction_text(RECORDS[2]) == "What is in the cup?"
    assert instruction_text(RECORDS[3]) == "Is in ?"
    assert instruction_text(talk("<image>", "A dog.")) == ""
    assert instruction_text(talk("two  blanks stay", "Yes.")) == "two  blanks stay"
    assert (
        instruction_text(
            talk("<img><IMG_CONTEXT></img>\nSo?", "Yes."), placeholders=["<img>", "<IMG_CONTEXT>", "</img>"]
        )
        == "So?"
    )
    with pytest.raises(ConfigError, match=r"all \| first \| last"):
        instruction_text(row, "some")


def test_to_messages():
    turns = [{"from": "gpt", "value": "Hello."}, *talk("Why?", "So.", "And then?")]
    assert to_messages(turns) == chat(["Why?"], ["So."])
    assert to_messages([{"from": "system", "value": "S"}, *turns])[0] == {"role": "system", "content": "S"}
    assert to_messages(chat(["Why?"], ["So."])) == chat(["Why?"], ["So."])


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        (None, "no list of conversation turns"),
        ("Why?", "no list of conversation turns"),
        ([], "no list of conversation turns"),
        (["Why?"], "Turn 0"),
        ([{"from": "human"}], "Turn 0"),
        ([{"from": "robot", "value": "x"}], "Turn 0"),
        ([{"from": [], "value": "x"}], "Turn 0"),
        ([{"from": "human", "value": 3}], "Turn 0"),
        (talk("Why?"), "no question with an answer"),
        ([{"from": "system", "value": "S"}], "no question with an answer"),
        ([*talk("Why?", "So."), *talk("Why?", "So.")[::-1]], "do not alternate"),
        (talk("Why?", " \n"), "is empty"),
    ],
)
def test_malformed_conversations(turns, why):
    with pytest.raises(DataError, match=why):
        to_messages({"conversations": turns})
