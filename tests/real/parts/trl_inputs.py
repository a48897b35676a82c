"""Write a tiny LLaVA with its processor, a tiny BERT, and data of TRL: `python trl_inputs.py MODEL BERT DATA`."""

import sys
from pathlib import Path

import datasets
import torch
import transformers
from PIL import Image

from covft.testing import tiny_llava

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "black": (0, 0, 0)}


def write(model_folder: str, bert_folder: str, data_folder: str) -> None:
    """Write all three."""
    torch.manual_seed(0)
    model, tokenizer, _ = tiny_llava()
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = tokenizer.chat_template = TEMPLATE
    model.save_pretrained(model_folder)
    processor.save_pretrained(model_folder)

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(bert_folder)
    tokenizer.save_pretrained(bert_folder)

    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": [part]}
    features = datasets.Features({"images": [datasets.Image()], "messages": [message]})
    rows = []
    for question in ("What colour is it?", "Is it red?"):
        for name, colour in COLOURS.items():
            answer = f"{name}." if "colour" in question else ("yes." if name == "red" else "no.")
            asked = [{"type": "image", "text": None}, {"type": "text", "text": question}]
            told = [{"type": "text", "text": answer}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            rows.append({"images": [Image.new("RGB", (40, 30), colour)], "messages": messages})
    Path(data_folder).mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(f"{data_folder}/train.parquet")


write(*sys.argv[1:])
