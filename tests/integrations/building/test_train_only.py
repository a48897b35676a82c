"""train_only on assembled models: the type of the trained weights, and the weights that no loss depends on."""

import pytest
import torch

from covft.integrations import build_llava, freeze_unread, train_only
from tests.helpers.building import TOWERS, prompt
from tests.helpers.releases import skip_before


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layer", [-2, 2, -1])
@pytest.mark.parametrize("vision", TOWERS)
def test_what_no_loss_depends_on_is_frozen(parts, tokenizer, vision, layer):
    if vision == "internvit":
        skip_before((5, 0), "an InternViT that gives LLaVA hidden states")
    model = build_llava(parts / vision, parts / "llama", tokenizer, feature_layer=layer)
    frozen = freeze_unread(model)
    model(**prompt(model, tokenizer)).logits.square().mean().backward()
    without = [name for name, p in model.model.vision_tower.named_parameters() if p.grad is None]
    if layer == -1:  # towers differ in whether a last norm follows the last state
        assert set(frozen) <= set(without)
        assert not any("encoder" in name for name in frozen)
    else:
        assert frozen == without
        assert any("layer.3." in name or "layers.3." in name for name in frozen)


def test_vision_leaves_out_what_no_loss_depends_on(parts, tokenizer):
    model = build_llava(parts / "dinov2", parts / "llama", tokenizer, dtype=torch.bfloat16)
    counts = train_only(model, ["projector", "vision"], dtype=torch.float32)
    trained = {name: p for name, p in model.model.vision_tower.named_parameters() if p.requires_grad}
    assert counts["vision"] == sum(p.numel() for p in trained.values())
    assert set(dict(model.model.vision_tower.named_parameters())) - set(trained) == set(freeze_unread(model))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.model.language_model.parameters()} == {torch.bfloat16}
    model.float()(**prompt(model, tokenizer)).logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("attached", [False, True])
def test_every_part_trained_beside_lora_gets_a_gradient(parts, tokenizer, attached):
    """peft keeps an unused copy of the projector, which DDP would wait for."""
    from peft import LoraConfig, get_peft_model

    import covft
    from covft.testing import HashTextEncoder

    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], exclude_modules=".*vision.*", modules_to_save=["multi_modal_projector"]
    )
    model = get_peft_model(model, lora)
    if attached:
        covft.attach(model, HashTextEncoder(16), tokenizer=tokenizer, layers=[1, 2], feature_layer=-2)
    train_only(model, ["projector", "llm", "vision", *(["covft"] if attached else [])])
    batch = {**prompt(model, tokenizer), **({"context_text": ["what is left?", "how many?"]} if attached else {})}
    model(**batch).logits.square().mean().backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in named.items() if p.grad is None] == []
    assert any("modules_to_save" in name for name in named)
    assert any("vision_tower" in name for name in named)
    assert not any(name.endswith("q_proj.base_layer.weight") for name in named)


def test_a_model_that_reads_the_last_state_trains_all_of_its_tower():
    from covft.testing import tiny_llava

    model = tiny_llava().model
    model.config.vision_feature_layer = -1
    counts = train_only(model, ["vision"])
    assert counts["vision"] == sum(p.numel() for p in model.model.vision_tower.parameters())
