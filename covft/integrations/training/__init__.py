"""Callback, trainer, checkpoints and recipes for training loops."""
