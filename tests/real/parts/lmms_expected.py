"""Answer the questions of a task without lmms-eval: `python lmms_expected.py DATA OUTPUT MODEL ...`.

OUTPUT gets, for each model, the answers of the attached model, and those of the same folder loaded without covft.
A folder that holds only an adapter is named with its base: `lora=lora-base`.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

import covft

# What classes of lmms-eval put before a conversation.
SYSTEM = {"qwen3_vl": "You are a helpful assistant."}


def without_covft(folder, base=""):
    """Load a folder as transformers does."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(base or folder)
    if base:
        model.load_adapter(folder)
    return model.eval()


def answers(model, processor, rows):
    """Ask `generate`, one question at a time."""
    found = []
    system = SYSTEM.get(model.config.model_type)
    before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for row in rows:
        asked = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template(
            [*before, {"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=[Image.open(row["image"]).convert("RGB")], text=prompt, return_tensors="pt")
        ids = processor.tokenizer
        with torch.no_grad():
            produced = model.generate(
                **inputs,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=ids.pad_token_id,
                eos_token_id=ids.eos_token_id,
            )
        found.append(ids.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


if __name__ == "__main__":
    data, output, *models = sys.argv[1:]
    rows, result = json.loads(Path(data).read_text()), {}
    for named in models:
        folder, _, base = named.partition("=")
        attached, processor = covft.load_model(folder, base=base or None)
        plain = without_covft(folder, base)
        result[folder] = {"covft": answers(attached, processor, rows), "plain": answers(plain, processor, rows)}
    Path(output).write_text(json.dumps(result))
