"""Saved encoders.

saving.py       selects the tensors to save, and the metadata of their base model
loading.py      reads a saved encoder, and fills its weights into a wrapped ViT
folder.py       the saved folder: written completely or not at all, checked when read
schema.py       the fields of the configuration, each checked
sources.py      which models a folder may name
fingerprint.py  which base weights a saved encoder belongs to
card.py         the model card
pretrained.py   transformers' own `save_pretrained` of a wrapped ViT, and of a model around one
reference.py    imports checkpoints that the paper's authors released
"""

from covft.checkpoints.reference import import_reference

__all__ = ["import_reference"]
