"""Small real tokenizers, real photographs, and folders in the published formats."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.templates import TEMPLATES

CORPUS = [
    "A chat between a curious user and an assistant. USER: What is left of the cup? ASSISTANT: A spoon.",
    "Describe the image in detail. The red dog stands on two legs, and it is raining.\nsystem user assistant",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
]


def _bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    return tokenizer


def _sentencepiece():
    """Built like Llama's: a blank is put before every stretch of text, and blanks belong to the word behind them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(plain)
    return tokenizer


@functools.cache
def build_tokenizer(name):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    template, kind, bos, eos, special = TEMPLATES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)), bos_token=bos, eos_token=eos, chat_template=template
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*special, "<image>", "<IMG_CONTEXT>", "<img>", "</img>"]}
    )
    tokenizer.pad_token = eos
    return tokenizer


@functools.cache
def _trained(kind):
    return {"bytes": _bytes, "sentencepiece": _sentencepiece}[kind]().to_str()


@pytest.fixture(params=list(TEMPLATES))
def model(request):
    """The name of each template with its tokenizer."""
    return request.param, build_tokenizer(request.param)


@pytest.fixture
def vicuna():
    return build_tokenizer("vicuna")


@pytest.fixture
def qwen():
    return build_tokenizer("qwen_2")


@functools.cache
def photograph(name):
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())


@functools.cache
def _encoded(name, suffix):
    buffer = io.BytesIO()
    photograph(name).save(buffer, Image.registered_extensions()[suffix])
    return buffer.getvalue()


def to_tensor(size):
    """An image processor in one function: resize, and colours from 0 to 1."""
    return functools.partial(_to_tensor, size=size)


def _to_tensor(picture, size):
    import torch

    resized = np.array(picture.resize((size, size)), dtype=np.float32)
    return torch.from_numpy(resized).permute(2, 0, 1) / 255


def talk(*turns):
    """Turns of human and gpt, as LLaVA writes them."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(turns)]


RECORDS = [
    {"id": "0", "image": "coco/cat.jpg", "conversations": talk("<image>\nWhat animal is it?", "A cat.")},
    {"id": "1", "conversations": talk("Who wrote Faust?", "Goethe did.", "When?", "In 1808.")},
    {"id": "2", "image": "coco/cup.png", "conversations": talk("What is in the cup?\n<image>", "Coffee.")},
    {"id": 3, "image": ["coco/cat.jpg", "coco/cup.png"], "conversations": talk("Is <image> in <image>?", "No.")},
    {"id": "4", "image": "vg/rocket.jpg", "conversations": talk("<image>\nÜber was?", "Eine Rakete — 火箭 🚀.")},
]


@pytest.fixture
def folder(tmp_path):
    """A LLaVA folder: llava.json, llava.jsonl and images/."""
    images = tmp_path / "images"
    for path, name in [("coco/cat.jpg", "chelsea"), ("coco/cup.png", "coffee"), ("vg/rocket.jpg", "rocket")]:
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        (images / path).write_bytes(_encoded(name, Path(path).suffix))
    write(tmp_path / "llava.json", RECORDS)
    write(tmp_path / "llava.jsonl", RECORDS)
    return tmp_path


def write(path, records):
    if path.suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    return path
