"""Trains a context-aware ViT in Lightning.

    python examples/one_liners/with_lightning.py --vit vit_base_patch16_clip_224.openai --text_encoder bert-base-uncased

The defaults are small, random and offline.
"""

import argparse

import lightning
import timm
import torch

import covft

parser = argparse.ArgumentParser()
parser.add_argument("--vit", default="test_vit", help="id; test_vit is small and random")
parser.add_argument("--text_encoder", default="hash:64", help="id or folder; hash:64 is a fake that needs no files")
args = parser.parse_args()


class Model(lightning.LightningModule):
    """Answers questions about images."""

    def training_step(self, batch: tuple) -> torch.Tensor:  # noqa: D102
        return torch.nn.functional.cross_entropy(self.encoder(*batch[:2]), batch[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.AdamW(self.encoder.param_groups(lr=2e-5, router_lr=1e-4))


model, vit = Model(), timm.create_model(args.vit, pretrained=args.vit != "test_vit", num_classes=3)
model.encoder = covft.wrap(vit, args.text_encoder)  # the one line
vit.get_classifier().requires_grad_(True)
batch = (torch.rand(2, *vit.pretrained_cfg["input_size"]), ["How many?", "What colour?"], torch.tensor([0, 2]))
data = torch.utils.data.DataLoader([batch, batch], batch_size=None)  # yours
lightning.Trainer(max_epochs=1, logger=False).fit(model, data)
model.encoder.save_pretrained("covft")
