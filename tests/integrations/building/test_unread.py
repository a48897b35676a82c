"""The parameters of the tower that no loss depends on."""

import pytest

from covft.integrations import build_llava, freeze_unread
from tests.helpers.building import TOWERS, prompt


@pytest.mark.parametrize("layer", [-2, 2, -1])
@pytest.mark.parametrize("vision", TOWERS)
def test_what_no_loss_depends_on_is_frozen(parts, tokenizer, vision, layer):
    model = build_llava(parts / vision, parts / "llama", tokenizer, feature_layer=layer)
    frozen = freeze_unread(model)
    model(**prompt(model, tokenizer)).logits.square().mean().backward()
    without = [name for name, p in model.model.vision_tower.named_parameters() if p.grad is None]
    if layer == -1:  # whether a last norm is behind the last state is the tower's own affair
        assert set(frozen) <= set(without)
        assert not any("encoder" in name for name in frozen)
    else:
        assert frozen == without
        assert any("layer.3." in name or "layers.3." in name for name in frozen)
