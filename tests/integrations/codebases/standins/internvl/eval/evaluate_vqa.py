import argparse

import torch

from internvl.model import load_model_and_tokenizer

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "question", "image", "out"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(args)
    features = []
    model.mlp1.register_forward_hook(lambda module, given, output: features.append(output))
    model.chat(tokenizer, torch.load(args.image), args.question, {"max_new_tokens": 2, "do_sample": False})
    torch.save(features[0], args.out)
