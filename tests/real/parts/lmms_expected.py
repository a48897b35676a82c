"""Answer the questions of a task without lmms-eval: `python lmms_expected.py MODEL DATA OUTPUT`.

OUTPUT gets the answers of the attached model, and those of the same folder loaded without covft.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

import covft


def answers(model, processor, rows):
    """Ask `generate`, one question at a time."""
    found = []
    for row in rows:
        asked = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
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
    folder, data, output = sys.argv[1:]
    asked = json.loads(Path(data).read_text())
    attached, processor = covft.load_model(folder)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    result = {"covft": answers(attached, processor, asked), "plain": answers(plain, processor, asked)}
    Path(output).write_text(json.dumps(result))
