"""Small real tokenizers, real photographs, and data sets in the published formats."""

import functools
import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image

from covft.data import ConversationDataset, DynamicTiling, ImageText, InternVLRows, LlavaRows, PadToSquare
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.prompts import KINDS


@functools.cache
def build_tokenizer(name):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    template, kind, bos, eos, special = TEMPLATES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)), bos_token=bos, eos_token=eos, chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*special, "<image>", "<IMG_CONTEXT>", "<img>", "</img>"]}
    )
    tokenizer.pad_token = eos
    return tokenizer


@functools.cache
def _trained(kind):
    return KINDS[kind](["<s>", "</s>"] if kind == "sentence-piece" else []).to_str()


@functools.cache
def photograph(name):
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())


@functools.cache
def encoded_photograph(name, suffix):
    buffer = io.BytesIO()
    photograph(name).save(buffer, Image.registered_extensions()[suffix])
    return buffer.getvalue()


def to_tensor(size):
    """An image processor in one function: resize, and colours from 0 to 1."""
    return functools.partial(_to_tensor, size=size)


def _to_tensor(picture, size):
    resized = np.array(picture.resize((size, size)), dtype=np.float32)
    return torch.from_numpy(resized).permute(2, 0, 1) / 255


def talk(*turns):
    """Turns of human and gpt, as LLaVA writes them."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(turns)]


TEXT = ImageText("<image>", per_tile=4)
RECORDS = [
    {"id": "0", "image": "coco/cat.jpg", "conversations": talk("<image>\nWhat animal is it?", "A cat.")},
    {"id": "1", "conversations": talk("Who wrote Faust?", "Goethe did.", "When?", "In 1808.")},
    {"id": "2", "image": "coco/cup.png", "conversations": talk("What is in the cup?\n<image>", "Coffee.")},
    {"id": 3, "image": ["coco/cat.jpg", "coco/cup.png"], "conversations": talk("Is <image> in <image>?", "No.")},
    {"id": "4", "image": "vg/rocket.jpg", "conversations": talk("<image>\nÜber was?", "Eine Rakete — 火箭 🚀.")},
]


def write(path, records):
    if path.suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def pack(folder, names, shard="0.tar", prefix="", mode="w"):
    with tarfile.open(folder / shard, mode) as tar:
        for name in names:
            tar.add(folder / "images" / name, prefix + name)
    return folder / shard


def llava_dataset(folder, name="llava.json", **options):
    source = LlavaRows(folder / name, folder / "images")
    settings = {"image_text": TEXT, "tiling": PadToSquare(), **options}
    return ConversationDataset(source, build_tokenizer("vicuna"), to_tensor(8), **settings)


def internvl_dataset(folder, entry, records, **options):
    write(folder / "rows.jsonl", records)
    meta = {"set": {"root": str(folder / "images"), "annotation": str(folder / "rows.jsonl"), **entry}}
    (folder / "meta.json").write_text(json.dumps(meta))
    settings = {
        "image_text": ImageText("<IMG_CONTEXT>", per_tile=2, before="<img>", after="</img>"),
        "tiling": DynamicTiling(max_tiles=6, tile_size=8),
        **options,
    }
    tokenizer = build_tokenizer("internlm_2")
    return ConversationDataset(InternVLRows(folder / "meta.json"), tokenizer, to_tensor(8), **settings)


def same(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        for key, value in one.items()
    )
