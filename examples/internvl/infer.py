"""InternVL: ask a question about a picture.

    python examples/internvl/infer.py --model runs/internvl-covft --image cup.jpg --question "What is left of the cup?"

--model is what finetune.py wrote; if there is a `covft/` in it, the tower sees the picture in the light of the
question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, HfArgumentParser

import covft
from covft.data import tile_image
from covft.integrations import image_text_of


@dataclass
class Arguments:
    """What the command line takes."""

    model: str = field(metadata={"help": "The folder that finetune.py wrote."})
    image: str = field(metadata={"help": "A picture."})
    question: str = field(metadata={"help": "What to ask about it."})
    max_tiles: int = field(default=12, metadata={"help": "Most tiles of the picture, without the thumbnail."})
    beams: int = field(default=1, metadata={"help": "Beams of the search; 1 takes the likeliest token each time."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "bfloat16 halves the memory."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    text_encoder: str | None = field(default=None, metadata={"help": "If it is not where it was in training."})


def main() -> str:
    """Print the answer, and return it."""
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    image_processor = AutoImageProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    if (Path(args.model) / "covft").is_dir():
        covft.attach(model, args.text_encoder, tokenizer=tokenizer, pretrained=Path(args.model) / "covft")

    size = model.config.vision_config.image_size[0]
    tiles = tile_image(Image.open(args.image).convert("RGB"), max_tiles=args.max_tiles, tile_size=size)
    messages = [{"role": "user", "content": f"<image>\n{args.question}"}]
    messages = image_text_of(model, tokenizer).expand(messages, [len(tiles)])
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = dict(tokenizer(prompt, add_special_tokens=False, return_tensors="pt"))
    inputs = {name: inputs[name].to(args.device) for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = image_processor(tiles, return_tensors="pt")["pixel_values"].to(args.device, dtype)

    output = model.generate(**inputs, num_beams=args.beams, do_sample=False, max_new_tokens=args.max_new_tokens)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(answer)
    return answer


if __name__ == "__main__":
    main()
