"""Load saved folders as `covft.load_model` does and compare them: `python trl_reload.py BASE FOLDER OTHER`.

Prints as JSON how many tensors of each part differ between the two, the largest difference, and what an answer depends
on. BASE is the model that LoRA was trained on.
"""

import json
import sys

import torch

import covft
from covft.integrations import parts_of


def compare(base: str, folder: str, other: str) -> None:
    """Print the comparison."""
    (model, processor), (second, _) = (covft.load_model(name, "bert", base=base) for name in (folder, other))
    parts, theirs = parts_of(model), dict(second.named_parameters())
    ours = dict(model.named_parameters())
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    found = {part: sum(parts[name] == part for name in different) for part in sorted(set(parts.values()))}
    largest = max((float((ours[n].double() - theirs[n].double()).abs().max()) for n in ours), default=0.0)
    ids = processor.tokenizer("USER: <image>\nIs it red? ASSISTANT:", return_tensors="pt")["input_ids"]
    image_token = model.config.image_token_id
    place = (ids[0] == image_token).nonzero()[0, 0]
    ids = torch.cat([ids[:, :place], ids.new_full((1, 4), image_token), ids[:, place + 1 :]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.ones(1, 3, 32, 32)}
    with torch.no_grad():
        read, told = (model(**inputs, **given).logits for given in ({}, {"context_text": ["something else"]}))
    result = {
        "different": found,
        "largest": largest,
        "same_tensors": sorted(ours) == sorted(theirs),
        "adapters": sum("lora_" in name for name in ours),
        "text_matters": bool((read - told).abs().max() > 0),
    }
    print("RESULT " + json.dumps(result))


compare(*sys.argv[1:])
