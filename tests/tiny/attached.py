"""Write small attached models whose answers depend on the picture and on what the tower is told.

python -m tests.tiny.attached FOLDER FAMILY ...

Each is saved to FOLDER/FAMILY. The family "lora" is an adapter of peft on a LLaVA, which goes to FOLDER/lora-base; the
adapter does not say where that is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import covft
from covft.testing import HashTextEncoder
from tests.helpers.towers import perturb
from tests.tiny.folders import build

LORA = {"r": 2, "target_modules": r".*language_model.*\.(q|v)_proj", "init_lora_weights": False}


def lively(family: str) -> tuple[Any, Any]:
    """Return a model of a family with its processor, whose pictures decide its answers."""
    model, processor = build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model, processor


def write(family: str, folder: Path) -> None:
    """Write the model of a family to a folder."""
    model, processor = lively("llava" if family == "lora" else family)
    if family == "lora":
        base = folder.with_name("lora-base")
        model.save_pretrained(base)
        processor.save_pretrained(base)
    covft.attach(model, HashTextEncoder(32), tokenizer=processor, layers=(1, 2))
    if family == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        covft.integrations.train_only(model, ("llm", "covft"))
    perturb(covft.get_encoder(model), 0.5)
    model.save_pretrained(str(folder))
    processor.save_pretrained(folder)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        write(name, Path(sys.argv[1]) / name)
