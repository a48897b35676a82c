import argparse
import json
import pathlib

import torch

from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model


def eval_model(args):
    tokenizer, model, _, _ = load_pretrained_model(args.model_path, None, args.model_name)
    conversation = conv_templates[args.conv_mode].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{args.question}")
    conversation.append_message(conversation.roles[1], None)
    ids = torch.tensor([tokenizer_image_token(conversation.get_prompt(), tokenizer)])
    image = torch.load(args.image_file)
    with torch.inference_mode():
        logits = model(input_ids=ids, images=image).logits
        answer = model.generate(ids, images=image, max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.save({"logits": logits, "answer": answer}, args.answers_file)
    pathlib.Path(args.answers_file).with_suffix(".json").write_text(json.dumps(answer.tolist()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--model-name", default="llava")
    parser.add_argument("--conv-mode", default="vicuna_v1")
    for name in ("question", "image-file", "answers-file"):
        parser.add_argument(f"--{name}")
    eval_model(parser.parse_args())
