"""Writes a tiny multimodal LLM with its processor, and data about pictures.

python tiny.py llava|qwen2_vl FOLDER          a model
python tiny.py data FOLDER                    mllm_demo.json with images, and LLaMA-Factory's dataset_info.json
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "black": (0, 0, 0)}
QUESTIONS = ("What colour is it?", "Which colour is this picture?")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def llava():
    """Return a LLaVA: a CLIP tower of 6 blocks and a Llama of 2."""
    from covft.integrations import llava_processor
    from covft.testing import tiny_llava

    tiny = tiny_llava()
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return tiny.model, llava_processor(tiny.model, tiny.tokenizer, image_processor)


def qwen2_vl():
    """Return a Qwen2-VL: a packed tower of 4 blocks and a language model of 2."""
    from covft.testing import tiny_internvl

    tokenizer = tiny_internvl().tokenizer
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {name: tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    config = transformers.Qwen2VLConfig(
        text_config={
            **SMALL,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={"embed_dim": 32, "hidden_size": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2},
        **{f"{name}_token_id": number for name, number in ids.items()},
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    sizes = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**sizes),
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def data(folder):
    """Write 8 questions about 4 pictures, and a row without a picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (60, 32 + 4 * number), colour).save(folder / "images" / f"{name}.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<image>{question}"},
                {"role": "assistant", "content": f"It is {name}."},
            ],
            "images": [f"images/{name}.png"],
        }
        for question in QUESTIONS
        for name in COLOURS
    ]
    (folder / "mllm_demo.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "mllm_demo.json", "formatting": "sharegpt", "tags": tags}
    entry["columns"] = {"messages": "messages", "images": "images"}
    (folder / "dataset_info.json").write_text(json.dumps({"mllm_demo": entry}))


if __name__ == "__main__":
    kind, target = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    if kind == "data":
        data(target)
    else:
        model, processor = {"llava": llava, "qwen2_vl": qwen2_vl}[kind]()
        for parameter in model.parameters():  # the usual 0.02 would make all pictures and questions alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(target)
        processor.save_pretrained(target)
