"""Chat templates as they are published, and tokenizers that are trained on the spot."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

CORPUS = [
    "what is left of the cup? a dog and a red ball. how many people are there, and where do they stand?",
    "USER: ASSISTANT: user assistant system model [INST] [/INST] <<SYS>> <</SYS>> You are a helpful assistant.",
    "A chat between a curious user and an assistant. USER: What is left of the cup? ASSISTANT: A spoon.",
    "Describe the image in detail. The red dog stands on two legs, and it is raining.\nsystem user assistant",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
]


class Template(NamedTuple):
    """A chat template, and the special tokens that it uses: the first two begin and end a text."""

    jinja: str
    specials: tuple[str, ...]
    has_system: bool = True


TEMPLATES = {
    "vicuna": Template(
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set first = messages[0]['content'] %}"
        "{% else %}{% set turns = messages %}{% set first = 'A chat between a curious user and an assistant.' %}"
        "{% endif %}{{ bos_token + first }}{% for message in turns %}{% if message['role'] == 'user' %}"
        "{{ ' USER: ' + message['content'] }}{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        ("<s>", "</s>"),
    ),
    # A processor's: contents are lists of parts, and a system message has no mark.
    "llava-hf": Template(
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
        "{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ("<s>", "</s>"),
    ),
    "llama-2": Template(
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set first = messages[0]['content'] %}"
        "{% else %}{% set turns = messages %}{% set first = false %}{% endif %}{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{% if loop.index0 == 0 and first != false %}"
        "{% set content = '<<SYS>>\n' + first + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
    ),
    "llama-3": Template(
        "{% for message in messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
    "chatml": Template(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    ),
    "phi-3": Template(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
        "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "internlm-2": Template(
        "{{ bos_token }}{% for message in messages %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<s>", "</s>", "<|im_end|>", "<|im_start|>"),
    ),
    "gemma": Template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        has_system=False,
    ),
    # The system prompt is put into the user's turn, with no more than an empty line between.
    "gemma-3": Template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": Template(
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set first = messages[0]['content'] %}"
        "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}"
        "{% if message['role'] == 'user' %}{% if loop.last and first is defined %}"
        "{{ '[INST] ' + first + '\n\n' + message['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
}


def _byte_level(specials: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, special_tokens=specials, show_progress=False),
    )
    return tokenizer


def _sentence_piece(specials: list[str]):
    """Built like Llama's: each stretch of text gets a blank in front, and blanks belong to the next word."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    all_bytes = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>", *all_bytes, *specials], show_progress=False),
    )
    return tokenizer


def _words(specials: list[str]):
    """Whole words only, and none of the words that covft probes with."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = " ".join(CORPUS) + " where? there? ball. there. assistant."
    pieces = pre_tokenizers.WhitespaceSplit().pre_tokenize_str(text)
    vocabulary = dict.fromkeys(["<unk>", *specials, *(piece for piece, _ in pieces)])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {"byte-level": _byte_level, "sentence-piece": _sentence_piece, "words": _words}
IMAGE, EXTRAS = "<image>", ("<img>", "</img>", "<pad>")


@cache
def tokenizer_of(template: str, kind: str = "byte-level"):
    """A tokenizer with a published chat template; its image placeholder is `<image>`."""
    from transformers import PreTrainedTokenizerFast

    specials = [*TEMPLATES[template].specials, IMAGE, *EXTRAS]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](specials),
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token="<pad>",
        unk_token=None if kind == "byte-level" else "<unk>",
        additional_special_tokens=[token for token in specials[2:] if token != "<pad>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = TEMPLATES[template].jinja
    return tokenizer


def render(template: str, turns: list[tuple[str, str]], *, answer: bool = True) -> str:
    """A conversation as the template writes it."""
    tokenizer = tokenizer_of(template)
    parts = template == "llava-hf"
    messages = [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
