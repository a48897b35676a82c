"""The guide for third parties keeps its word; its code runs in tests/test_docs.py."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "adapter.md"


def test_an_adapter_takes_15_lines():
    text = GUIDE.read_text()
    assert text.startswith("# Add an adapter in 15 lines\n")
    (description,) = re.findall(r"## Its description\n+```python\n(.*?)```", text, flags=re.DOTALL)
    assert "ViTFamily(" in description
    assert "covft.describe(vit, adapter=family)" in description
    assert len(description.splitlines()) <= 15


def test_every_field_is_explained():
    from dataclasses import fields

    from covft.adapters import InputFormat, ViTFamily

    explained = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", GUIDE.read_text(), flags=re.MULTILINE)))
    )
    # The others say what to call it, or belong to a handful of models.
    assert {field.name for field in fields(ViTFamily)} - explained == {"name", "library", "refused"}
    assert {field.name for field in fields(InputFormat)} - explained == {"mask_unit", "image_axes"}
