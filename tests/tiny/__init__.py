"""Small local folders of every multimodal LLM that `docs/models` has a page for: a model, a processor, data."""
