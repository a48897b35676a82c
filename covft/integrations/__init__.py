"""Where a wrapped ViT meets a multimodal LLM."""

from covft.integrations.attaching import attach, detach, get_encoder

__all__ = ["attach", "detach", "get_encoder"]
