"""The parts of a multimodal LLM, and the recipes that train them."""

from __future__ import annotations

import pytest

from covft.errors import ConfigError
from covft.integrations import (
    RECIPES,
    MLLMTrainingArguments,
    parts_of,
    train_only,
)
from tests.helpers.training import (
    COVFT_PARTS,
    build,
    tower_name,
)

pytestmark = pytest.mark.usefixtures("quiet")


def test_parts__every_parameter_belongs_to_one():
    model = build()
    parts = parts_of(model)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    assert parts["lm_head.weight"] == "llm"
    assert parts["model.multi_modal_projector.linear_1.weight"] == "projector"
    tower = tower_name(model)
    assert parts[f"{tower}.embeddings.patch_embedding.weight"] == "vision"
    assert parts[f"{tower}.encoder.layers.1.mlp.experts.0.fc1.weight"] == "experts"
    assert parts[f"{tower}.encoder.layers.1.mlp.context.image.up.weight"] == "router"
    assert parts[f"{tower}.encoder.layers.0.layer_norm1.weight"] == "norms"
    assert parts[f"{tower}.encoder.layers.3.layer_norm1.weight"] == "vision"  # after the last that is adapted
    plain = build(attached=False)
    assert set(parts_of(plain).values()) == {"vision", "projector", "llm"}


def test_train_only__trains_these_parts_and_no_other():
    model = build()
    owner = parts_of(model)
    before = {name for name, p in model.named_parameters() if p.requires_grad and owner[name] in COVFT_PARTS}
    counts = train_only(model, ["projector"])
    assert {owner[name] for name, p in model.named_parameters() if p.requires_grad} == {"projector"}
    assert counts == {"projector": sum(p.numel() for n, p in model.named_parameters() if owner[n] == "projector")}
    train_only(model, ["covft", "llm"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {owner[name] for name in trained} == {"experts", "router", "norms", "llm"}
    assert {name for name in trained if owner[name] in COVFT_PARTS} == before
    with pytest.raises(ConfigError, match="no part heads"):
        train_only(model, ["heads"])
    with pytest.raises(ConfigError, match="no part experts") as caught:
        train_only(build(attached=False), ["covft"])
    assert "covft.attach" in str(caught.value)


def test_train_only__inside_peft_the_language_model_is_what_peft_added():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*\.q_proj")
    model = peft.get_peft_model(build(), config)
    counts = train_only(model, ["llm", "covft"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    lora = [name for name in trained if "lora_" in name]
    assert len(lora) == 4
    assert counts["llm"] == sum(dict(model.named_parameters())[name].numel() for name in lora)
    assert {parts_of(model)[name] for name in trained} == {"llm", *COVFT_PARTS}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes__are_arguments_of_the_trainer(name, tmp_path):
    recipe = RECIPES[name]
    options = {**recipe.arguments, "use_cpu": True, "per_device_train_batch_size": 4}
    args = MLLMTrainingArguments(str(tmp_path), **options)
    assert args.gradient_accumulation_steps * 4 == recipe.arguments["global_batch_size"]
    assert args.bf16
    counts = train_only(build(), recipe.parts)
    assert all(counts.values())
