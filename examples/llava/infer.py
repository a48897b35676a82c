"""LLaVA: ask a question about an image.

    python examples/llava/infer.py --model runs/llava-covft --image cup.jpg --question "What is left of the cup?"

--model is the output folder of finetune.py. If it contains `covft/`, the tower is conditioned on the question.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import HfArgumentParser

from covft.integrations import load_model, pad_to_square


@dataclass
class Arguments:
    """Command-line options."""

    model: str = field(metadata={"help": "Output folder of finetune.py."})
    image: str = field(metadata={"help": "Image file."})
    question: str = field(metadata={"help": "Question about the image."})
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
    model, processor = load_model(args.model, args.text_encoder, dtype=dtype)
    model.to(args.device)

    mean = processor.image_processor.image_mean
    image = pad_to_square(Image.open(args.image).convert("RGB"), tuple(int(255 * channel) for channel in mean))
    messages = [{"role": "user", "content": f"{processor.image_token}\n{args.question}"}]
    prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
    inputs = {name: inputs[name].to(args.device) for name in ("input_ids", "attention_mask", "pixel_values")}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)

    output = model.generate(**inputs, num_beams=args.beams, do_sample=False, max_new_tokens=args.max_new_tokens)
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(answer)
    return answer


if __name__ == "__main__":
    main()
