"""Small folders in the published formats: models, tokenizers, LLaVA's and InternVL's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.prompts import KINDS

SIZE = 28
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 1024,
}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "black": (0, 0, 0)}


def write_models(root: Path) -> None:
    """`clip`, `internvit`, `vicuna`, `phi` and `bert` below a folder, each as `from_pretrained` loads it."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPVisionConfig,
        InternVLVisionConfig,
        InternVLVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
    )

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**VISION, image_size=SIZE, patch_size=14).to_dict()
    CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 30}, vision_config=vision)).save_pretrained(root / "clip")
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        root / "clip"
    )
    internvit = InternVLVisionConfig(**VISION, image_size=[SIZE, SIZE], patch_size=[7, 7], attention_bias=True)
    InternVLVisionModel(internvit).save_pretrained(root / "internvit")
    # Of another size than the tower, as that of DINOv2 is.
    CLIPImageProcessor(size={"shortest_edge": 448}, crop_size={"height": 448, "width": 448}).save_pretrained(
        root / "internvit"
    )
    LlamaForCausalLM(LlamaConfig(**LANGUAGE, pad_token_id=None)).save_pretrained(root / "vicuna")
    tokenizer(["<unk>", "<s>", "</s>"]).save_pretrained(root / "vicuna")
    Phi3ForCausalLM(Phi3Config(**LANGUAGE, pad_token_id=2, eos_token_id=[2, 3])).save_pretrained(root / "phi")
    marks = ["<unk>", "<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer(marks).save_pretrained(root / "phi")
    write_bert(root / "bert")


def write_llava_model(root: Path) -> Path:
    """`model`, a LLaVA with the processor and chat template of llava-hf, and `images` below a folder."""
    import copy

    from covft.integrations import build_llava, llava_processor, load_image_processor
    from tests.helpers.prompts import TEMPLATES, tokenizer_of

    write_models(root / "parts")
    write_images(root / "images")
    tokenizer = copy.deepcopy(tokenizer_of("llava-hf"))
    model = build_llava(root / "parts" / "clip", root / "parts" / "vicuna", tokenizer)
    processor = llava_processor(model, tokenizer, load_image_processor(root / "parts" / "clip"))
    assert processor.chat_template == TEMPLATES["llava-hf"].jinja
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root


def write_trl_data(folder: Path) -> None:
    """`train.parquet` with images and messages, as TRL reads it."""
    import datasets
    from PIL import Image

    rows = []
    for name, colour in COLOURS.items():
        question = [{"type": "image", "text": None}, {"type": "text", "text": "what is left of the cup?"}]
        answer = [{"type": "text", "text": f"{name}."}]
        rows.append(
            {
                "images": [Image.new("RGB", (40, 30), colour)],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            }
        )
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": [part]}
    features = datasets.Features({"images": [datasets.Image()], "messages": [message]})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")


def tokenizer(specials: list[str]) -> Any:
    """A byte-level tokenizer whose special tokens come first."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS["byte-level"](specials),
        unk_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        additional_special_tokens=specials[3:],
        model_input_names=["input_ids", "attention_mask"],
    )
    assert len(made) < LANGUAGE["vocab_size"]
    return made


def write_bert(folder: Path) -> None:
    """A small BERT with a WordPiece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] what colour is it ? the picture describe how many are there which this".split()
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(**small, vocab_size=len(words), max_position_embeddings=64))
    for parameter in bert.parameters():  # the usual 0.02 would make all questions alike
        torch.nn.init.normal_(parameter, std=0.3)
    bert.save_pretrained(folder)


def talk(*turns: str) -> list[dict[str, str]]:
    """Turns of human and gpt, as LLaVA writes them."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(turns)]


def write_llava(root: Path) -> None:
    """`images/`, `captions.json` for stage 1 and `train.json`, a mixture with rows about no image and about two."""
    write_images(root / "images")
    colours = list(COLOURS)
    captions = [
        {"id": name, "image": f"{name}.png", "conversations": talk("Describe it.\n<image>", f"a {name} picture")}
        for name in colours
    ]
    rows = [
        {"id": f"{name}-{i}", "image": f"{name}.png", "conversations": talk(f"{question}\n<image>", f"{name}.")}
        for name in colours
        for i, question in enumerate(["What colour is it?", "Which colour is this?"])
    ]
    rows.append({"id": "text", "conversations": talk("How many are there?", "Two.", "What is it?", "A cup.")})
    rows.append({"id": "more text", "conversations": talk("What is a cup?", "It is for tea.")})
    rows.append(
        {
            "id": "two",
            "image": ["red.png", "blue.png"],
            "conversations": talk("<image>\n<image>\nWhich is red?", "One."),
        }
    )
    rows.append({"id": "blue again", "image": "blue.png", "conversations": talk("<image>\nIs this red?", "No.")})
    (root / "captions.json").write_text(json.dumps(captions * 2))
    (root / "train.json").write_text(json.dumps(rows))


def write_internvl(root: Path) -> None:
    """`meta.json`: pictures that are cut into tiles, repeated, and a data set of text alone."""
    write_images(root / "images")
    shown = [
        {"id": i, "image": f"{name}.png", "conversations": talk("<image>\nWhat colour is it?", f"{name}.")}
        for i, name in enumerate(COLOURS)
    ]
    text = [{"id": i, "conversations": talk("How many are there?", "Two.")} for i in range(2)]
    for name, rows in (("shown", shown), ("text", text)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    meta = {
        "shown": {
            "root": str(root / "images"),
            "annotation": str(root / "shown.jsonl"),
            "repeat_time": 1.5,
            "length": 4,
        },
        "text": {"root": "", "annotation": str(root / "text.jsonl"), "repeat_time": 1, "length": 2},
    }
    (root / "meta.json").write_text(json.dumps(meta))


def write_images(folder: Path) -> None:
    """A picture of each colour, none of them square."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (60, 28 + 4 * number), colour).save(folder / f"{name}.png")
