"""Load a checkpoint as `swift infer` does and look at its tower: `python swift_reload.py MODEL CHECKPOINT TUNER IMAGE`.

Prints a JSON object: the routing weights of two questions about one image differ by `text`; the logits of the model
differ by `tower` without its adapted tower, and by `reload` from those of the model that the guide's own code loads.
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from swift.arguments import InferArguments
from swift.infer_engine import InferRequest, RequestConfig, TransformersEngine
from swift.pipelines.utils import prepare_model_template
from transformers import AutoModelForImageTextToText, AutoProcessor

import covft
from covft.integrations.codebases import ms_swift


def main(model: str, checkpoint: str, tuner: str, image: str) -> None:
    """Print the differences."""
    plugin = str(Path(ms_swift.__file__).with_name("covft_plugin.py"))
    args = InferArguments(
        model=model, adapters=[checkpoint], tuner_type=tuner, external_plugins=[plugin], torch_dtype="float32"
    )
    theirs, template = prepare_model_template(args)
    engine: Any = TransformersEngine(theirs, template=template)
    weights = []
    for question in ("what colour is it?", "how bright is it?"):
        request = InferRequest([{"role": "user", "content": f"<image>{question}"}], images=[image])
        engine.infer([request], RequestConfig(max_tokens=1, temperature=0), use_tqdm=False)
        weights.append(next(iter(covft.get_encoder(theirs).routing_weights().values())))
    processor = AutoProcessor.from_pretrained(model)
    mine: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    if tuner == "covft_lora":
        mine = peft.PeftModel.from_pretrained(mine, checkpoint)
    others = "covft/trained.safetensors" if tuner == "covft_lora" else "model.safetensors"
    mine.load_state_dict(load_file(Path(checkpoint, others)), strict=False)
    covft.attach(mine, tokenizer=processor, pretrained=f"{checkpoint}/covft")
    inputs = _inputs(template, image)
    expected, found = _logits(theirs, inputs), _logits(mine, inputs)
    covft.detach(theirs.get_base_model() if hasattr(theirs, "get_base_model") else theirs)
    plain = _logits(theirs, inputs)
    print(
        json.dumps(
            {
                "text": float((weights[0] - weights[1]).abs().max()),
                "tower": float((plain - expected).abs().max()),
                "reload": float((found - expected).abs().max()),
                "wrapped": len(covft.get_encoder(mine).layers),
            }
        )
    )


def _inputs(template: Any, image: str) -> dict[str, Any]:
    """Return one row as ms-swift encodes it."""
    template.set_mode("transformers")
    row = template.encode({"messages": [{"role": "user", "content": "<image>what colour is it?"}], "images": [image]})
    batch = template.data_collator([row])
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    names = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"}
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in inputs.items() if name in names}).logits


if __name__ == "__main__":
    main(*sys.argv[1:])
