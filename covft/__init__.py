"""covft: context-aware visual fine-tuning of vision transformers."""

__version__ = "0.1.0"
