"""Builds multimodal LLMs from pretrained parts, and saves what was trained."""
