r"""Makes the tower of a Hugging Face multimodal LLM context-aware, and asks it a question.

    python examples/one_liners/with_hf.py --model llava-hf/llava-1.5-7b-hf --image cup.jpg \
        --question "What is left of the cup?"

Until the tower is trained, the answer is that of the original model. --model may also be a folder that was trained.
"""

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import covft

parser = argparse.ArgumentParser()
for name in ("--model", "--image", "--question"):
    parser.add_argument(name, required=True)
parser.add_argument("--text_encoder")
args = parser.parse_args()

if (Path(args.model) / "covft").is_dir():
    model, processor = covft.load_model(args.model, args.text_encoder)
else:
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    covft.attach(model, args.text_encoder or "bert-base-uncased", tokenizer=processor)  # the one line
covft.get_encoder(model).print_trainable_parameters()
content = [{"type": "image", "image": Image.open(args.image)}, {"type": "text", "text": args.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)  # fmt: skip
output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
