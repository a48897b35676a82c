"""Write a tiny model with its processor, and data in ms-swift's format: `python swift_models.py KIND FOLDER DATA`."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from covft.testing import _byte_tokenizer, tiny_internvl, tiny_llava

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def llava() -> tuple[Any, Any]:
    """A LLaVA-1.5 of transformers."""
    model, tokenizer, _ = tiny_llava()
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = VICUNA
    return model, processor


def internvl() -> tuple[Any, Any]:
    """An InternVL of transformers' own classes."""
    model, tokenizer, _ = tiny_internvl()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    with tempfile.TemporaryDirectory() as folder:  # a processor of InternVL reads their names off the tokenizer
        tokenizer.save_pretrained(folder)
        file = Path(folder, "tokenizer_config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "extra_special_tokens": {**named, "video_token": "<video>"}}))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False)
    videos = transformers.InternVLVideoProcessor(size={"height": 32, "width": 32})
    processor = transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4)
    processor.chat_template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    return model, processor


def qwen() -> tuple[Any, Any]:
    """A Qwen2.5-VL of transformers; ms-swift expects the published ids of its placeholders."""
    named = {"<|image_pad|>": 151655, "<|video_pad|>": 151656}
    tokenizer = _byte_tokenizer("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", template=CHATML)
    fill = named["<|image_pad|>"] - len(tokenizer)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(fill)])
    tokenizer.add_special_tokens({"additional_special_tokens": list(named)}, replace_extra_special_tokens=False)
    assert all(tokenizer.convert_tokens_to_ids(token) == number for token, number in named.items())
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "depth": 6,
            "out_hidden_size": 32,
            "patch_size": 14,
            "fullatt_block_indexes": [1, 3, 5],
            "window_size": 56,
        },
        text_config={
            **SMALL,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=named["<|image_pad|>"],
        video_token_id=named["<|video_pad|>"],
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
    processor = transformers.Qwen2_5_VLProcessor(images, tokenizer, transformers.Qwen2VLVideoProcessor())
    processor.chat_template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return model, processor


def main(kind: str, folder: str, data: str) -> None:
    torch.manual_seed(0)
    model, processor = {"llava": llava, "internvl": internvl, "qwen": qwen}[kind]()
    with torch.no_grad():  # fresh projectors are so small that no image would matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    place = Path(data)
    place.mkdir(exist_ok=True)
    colors = [("red", (220, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 220)), ("white", (240, 240, 240))]
    with (place / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(16):
            name, color = colors[number % 4]
            path = place / f"{name}.png"
            Image.new("RGB", (56, 56), color).save(path)
            pair = [("what colour is it?", name), ("how bright is it?", f"{sum(color) // 3}")][number // 4 % 2]
            messages = [{"role": "user", "content": f"<image>{pair[0]}"}, {"role": "assistant", "content": pair[1]}]
            file.write(json.dumps({"messages": messages, "images": [str(path.resolve())]}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
