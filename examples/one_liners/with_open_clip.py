"""Makes an image tower of open_clip context-aware; the text tower of the same model encodes the question.

python examples/one_liners/with_open_clip.py --model ViT-L-14-336 --pretrained openai
"""

import argparse

import open_clip
import torch

import covft

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="ViT-B-32")
parser.add_argument("--pretrained", default=None, help="a tag of open_clip; random weights by default")
args = parser.parse_args()

clip = open_clip.create_model(args.model, pretrained=args.pretrained)
text_encoder = (clip, open_clip.get_tokenizer(args.model))
encoder = covft.wrap(clip.visual, text_encoder, experts=4, routing="dense")  # the one line
encoder.print_trainable_parameters()

images = torch.rand(2, 3, *clip.visual.image_size)
features = encoder(images, ["What is left of the cup?", "How many people are there?"])
print(f"features {tuple(features.shape)}")
