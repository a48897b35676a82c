"""Tunes a multimodal LLM: its tower by any method, its language model and its projector."""
