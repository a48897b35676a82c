r"""Makes any ViT of timm context-aware.

    python examples/one_liners/with_timm.py --vit vit_base_patch16_clip_224.openai --pretrained \
        --text_encoder bert-base-uncased

The defaults are small, random and offline.
"""

import argparse

import timm
import torch

import covft

parser = argparse.ArgumentParser()
parser.add_argument("--vit", default="test_vit")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--text_encoder", default="hash:64", help="id or folder; hash:64 is a fake that needs no files")
args = parser.parse_args()

vit = timm.create_model(args.vit, pretrained=args.pretrained, num_classes=0)
encoder = covft.wrap(vit, args.text_encoder, experts=4, routing="dense")  # the one line
encoder.print_trainable_parameters()

images = torch.rand(2, *vit.pretrained_cfg["input_size"])
features = encoder(images, ["What is left of the cup?", "How many people are there?"])
print(f"features {tuple(features.shape)}")
