"""InternVL: ask a question about an image.

    python examples/internvl/infer.py --model runs/internvl-covft --image cup.jpg --question "What is left of the cup?"

--model is the output folder of finetune.py. If it contains `covft/`, the tower is conditioned on the question.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser

from covft.integrations import image_text_of, load_model, tile_image


@dataclass
class Arguments:
    """Command-line options."""

    model: str = field(metadata={"help": "Output folder of finetune.py."})
    image: str = field(metadata={"help": "Image file."})
    question: str = field(metadata={"help": "Question about the image."})
    max_tiles: int = field(default=12, metadata={"help": "Most tiles of the image, without the thumbnail."})
    beams: int = field(default=1, metadata={"help": "Beams; 1 is greedy search."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "bfloat16 halves the memory."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Device."})
    text_encoder: str | None = field(
        default=None, metadata={"help": "Id or folder; needed if it was a folder in training."}
    )


def main() -> str:
    """Print and return the answer."""
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    image_processor = AutoImageProcessor.from_pretrained(args.model)
    model, _ = load_model(args.model, args.text_encoder, processor=tokenizer, dtype=dtype)
    model.to(args.device)

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
