"""Writes the model card, the README.md of a saved encoder."""

from __future__ import annotations

import re
import unicodedata

from covft.adapters.sources import source_of
from covft.checkpoints.sources import LOCAL, is_hub_id, public_source
from covft.surgery.wrapped import WrappedViT
from covft.utils.parameters import count


def model_card(encoder: WrappedViT) -> str:
    """Write the model card: what the encoder is, what it was made from, how to load it.

    Returns:
        Markdown with the metadata block that the Hugging Face Hub reads.
    """
    config, source, text = encoder.covft_config, public_source(source_of(encoder.vit)), public_source(encoder.text_name)
    hub_base = source.removeprefix("hf:").partition("?")[0] if source and source.startswith("hf:") else ""
    trained = count(encoder.trainable_parameters())
    settings = "\n".join(f"| `{name}` | {_code(str(value))} |" for name, value in config.to_dict().items())
    class_name = encoder.spec.class_name
    title = class_name if re.fullmatch(r"\w{1,100}", class_name) else _code(class_name)
    pass_it = f"{_code(f'{encoder.spec.library} {class_name}')}; pass it as `vit=`"
    metadata = ["---", "library_name: covft", "tags:", "- covft", "- vision", "- multimodal"]
    if hub_base.count("/") == 1 and is_hub_id(hub_base):
        metadata.append(f"base_model: {hub_base}")
    metadata.append("---")
    return (
        "\n".join(metadata)
        + f"""

# Context-aware {title}

A vision transformer whose features depend on the question, made with `covft` (CoVFT, context-aware visual
fine-tuning).

```python
import covft

encoder = covft.load("this/folder/or/repository")
tokens = encoder(images, ["What is left of the cup?"])
```

| | |
| --- | --- |
| base ViT | {_shown(source) if source else pass_it} |
| text encoder | {_shown(text) if text else "none"}, width {encoder.text_dim} |
| parameters trained | {trained:,} |
{settings}

The file `model.safetensors` holds only what was added or trained; the base weights are needed too.
"""
    )


def _shown(source: str) -> str:
    folder = source.removeprefix(f"{LOCAL}:")
    return _code(source) if folder == source else f"a local folder, {_code(folder)}"


def _code(text: str) -> str:
    """Show a text of someone else as code, in which no markup works, in a cell of a table."""
    printed = "".join(c if unicodedata.category(c)[0] not in "CZ" else " " for c in text)
    printed = " ".join(printed.split())[:200].rstrip("\\")
    return "`" + printed.replace("`", "'").replace("|", "\\|") + "`" if printed else "unnamed"
