"""Writes the model card, the README.md of a saved encoder."""

from __future__ import annotations

from covft.adapters.sources import source_of
from covft.surgery.wrapped import WrappedViT
from covft.utils.parameters import count


def model_card(encoder: WrappedViT) -> str:
    """Write the model card: what the encoder is, what it was made from, how to load it.

    Returns:
        Markdown with the metadata block that the Hugging Face Hub reads.
    """
    config, source = encoder.covft_config, source_of(encoder.vit)
    hub_base = source.removeprefix("hf:") if source and source.startswith("hf:") else None
    trained = count(encoder.trainable_parameters())
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in config.to_dict().items())
    metadata = ["---", "library_name: covft", "tags:", "- covft", "- vision", "- multimodal"]
    if hub_base and hub_base.count("/") == 1 and not hub_base.startswith(("/", ".")):
        metadata.append(f"base_model: {hub_base}")
    metadata.append("---")
    return (
        "\n".join(metadata)
        + f"""

# Context-aware {encoder.spec.class_name}

A vision transformer whose features depend on the question, made with `covft` (CoVFT, context-aware visual
fine-tuning).

```python
import covft

encoder = covft.load("this/folder/or/repository")
tokens = encoder(images, ["What is left of the cup?"])
```

| | |
| --- | --- |
| base ViT | {source or f"{encoder.spec.library} {encoder.spec.class_name}; pass it as `vit=`"} |
| text encoder | {encoder.text_name or "none"}, width {encoder.text_dim} |
| parameters trained | {trained:,} |
{settings}

The file `model.safetensors` holds only what was added or trained; the base weights are needed too.
"""
    )
