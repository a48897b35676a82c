"""Compare a model after training with the one that is loaded from its folder.

original_reload.py train FILE MODULE ...            runs a module as `python -m` does, and keeps the logits
original_reload.py load llava|internvl FOLDER FILE TEXT_ENCODER  prints the largest difference from them; a method
without text has the encoder "none"
"""

from __future__ import annotations

import copy
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import torch


def train(file: str, *command: str) -> None:
    """Run a training, and write a batch and what the trained model says to it."""
    import transformers

    run = transformers.Trainer.train

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        batch = self.data_collator([self.train_dataset[number] for number in (1, 7)])
        # Training runs under autocast, which loaded models do not.
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if isinstance(model.forward, types.MethodType):  # accelerate has bound it, and a copy would call the original
            model.forward = model.forward.__func__
        model = as_loaded(model)
        torch.save({"batch": dict(batch), "logits": logits_of(model, batch)}, file)
        return result

    transformers.Trainer.train = recorded
    sys.argv, sys.path[0] = list(command), ""
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def as_loaded(model: Any) -> Any:
    """Return a copy in the types that the codebase's loader gives it."""
    model = copy.deepcopy(model).eval()
    if not hasattr(model, "get_model"):  # InternVL
        return model.to(torch.bfloat16)
    tower, model.get_model().vision_tower = model.get_model().vision_tower.float(), None
    model = model.half()
    model.get_model().vision_tower = tower
    torch.set_default_dtype(torch.half)  # in which from_pretrained computes the tables of positions
    for layer in model.get_model().layers:
        layer.self_attn._init_rope()
    torch.set_default_dtype(torch.float)
    return model


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    """Return the logits of a batch."""
    batch = {name: value for name, value in batch.items() if name != "labels"}
    for name in ("images", "pixel_values"):
        if name in batch:
            batch[name] = batch[name].to(model.dtype)
    with torch.inference_mode():
        return model(**batch).logits.float()


def load(codebase: str, folder: str, file: str, text_encoder: str) -> None:
    """Load a model as the guides do, and compare."""
    encoder = None if text_encoder == "none" else text_encoder
    model = {"llava": load_llava, "internvl": load_internvl}[codebase](folder, encoder)
    kept = torch.load(file)
    difference = (logits_of(model.eval(), kept["batch"]) - kept["logits"]).abs().max().item()
    print(f"difference {difference}")


def load_llava(folder: str, text_encoder: str | None) -> Any:
    """Load as in docs/guides/original-llava.md."""
    from llava.conversation import conv_templates
    from llava.model.builder import load_pretrained_model

    from covft.integrations.codebases import llava

    tokenizer, model, *_ = load_pretrained_model(folder, None, Path(folder).name)
    return llava.attach(
        model, text_encoder, tokenizer=tokenizer, conversation=conv_templates["vicuna_v1"], pretrained=f"{folder}/covft"
    )


def load_internvl(folder: str, text_encoder: str | None) -> Any:
    """Load as in docs/guides/internvl-chat.md."""
    from transformers import AutoModel, AutoTokenizer

    from covft.integrations.codebases import internvl

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return internvl.attach(model, text_encoder, tokenizer=tokenizer, pretrained=f"{folder}/covft")


if __name__ == "__main__":
    {"train": train, "load": load}[sys.argv[1]](*sys.argv[2:])
