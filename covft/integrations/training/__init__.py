"""Training loops: callback, trainer, checkpoints, recipes."""
