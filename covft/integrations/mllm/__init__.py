"""A context-aware tower inside a multimodal LLM."""
