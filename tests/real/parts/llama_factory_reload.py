"""Reload what LLaMA-Factory saved, with covft alone, and print a JSON object.

python llama_factory_reload.py tower BASE EARLIER LATER   what of the tower training has changed
python llama_factory_reload.py loss BASE FOLDER YAML      the loss of the reloaded model on LLaMA-Factory's own batches
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import transformers

import covft

PARTS = (".experts.", ".router.", ".context.")


def load(folder: str, base: str) -> Any:
    """Load the model of a folder; one of adapters needs the model below them."""
    adapters = (Path(folder) / "adapter_config.json").is_file()
    return covft.load_model(folder, base=base if adapters else None)[0]


def tower(base: str, earlier: str, later: str) -> dict[str, Any]:
    """Return the adapted blocks, the share of elements that moved between two checkpoints, and what else changed."""
    plain = transformers.AutoModelForImageTextToText.from_pretrained(base)
    before, after = (covft.get_encoder(load(folder, base)) for folder in (earlier, later))
    tower = getattr(plain.model, "vision_tower", None) or plain.model.visual
    original, old = dict(tower.named_parameters()), dict(before.vit.named_parameters())
    counts: dict[str, list[int]] = {}
    changed = []
    for name, value in after.vit.named_parameters():
        part = next((part.strip(".") for part in PARTS if part in name), None)
        if part is None and "norm" in name and (value != original[name]).any():
            part = "norms"
        if part is None:
            changed += [name] * bool((value != original[name]).any())
            continue
        count = counts.setdefault(part, [0, 0])
        count[0] += int((value != old[name]).sum())
        count[1] += value.numel()
    norms = [name for name, value in after.vit.named_parameters() if "norm" in name and name in original]
    return {
        "layers": list(after.layers),
        "moved": {part: moved / total for part, (moved, total) in sorted(counts.items())},
        "changed": changed,
        "norms": sorted(name for name in norms if (after.vit.get_parameter(name) != original[name]).any()),
        "expected norms": sorted(norms_to_train(after)),
    }


def norms_to_train(encoder: Any) -> list[str]:
    """Return the names of the norms of blocks 0 to the last adapted one, outside the FFN: what `train_norms` is."""
    found = []
    for name, _ in encoder.vit.named_parameters():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if "norm" in name and ".mlp." not in name and number is not None and number <= max(encoder.layers):
            found.append(name)
    return found


def loss(base: str, folder: str, settings: str) -> dict[str, float]:
    """Return the evaluation loss of the reloaded model."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from omegaconf import OmegaConf

    model = load(folder, base)
    given = OmegaConf.to_container(OmegaConf.load(settings))
    model_args, data_args, training_args, _, _ = get_train_args(given)
    tools = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tools["tokenizer"], data_args)
    data = get_dataset(template, model_args, data_args, training_args, stage="sft", **tools)
    collator = SFTDataCollatorWith4DAttentionMask(template=template, model=model, pad_to_multiple_of=8, **tools)
    plain = transformers.TrainingArguments(
        "reloaded",
        use_cpu=True,
        bf16=training_args.bf16,
        report_to=[],
        remove_unused_columns=False,
        per_device_eval_batch_size=training_args.per_device_eval_batch_size,
    )
    trainer = transformers.Trainer(model, plain, data_collator=collator, eval_dataset=data["eval_dataset"])
    trainer.model_accepts_loss_kwargs = False
    return {"loss": trainer.evaluate()["eval_loss"]}


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    print("result", json.dumps({"tower": tower, "loss": loss}[what](*given)))
