"""Multimodal LLMs from pretrained parts."""
