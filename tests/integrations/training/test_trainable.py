"""Trainings that would not reach the adapted tower: peft, quantised training and requires_grad_ in every order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import covft
from covft.errors import MissingGradientError, UnsupportedViTError
from covft.integrations import CoVFTCallback, MLLMTrainer, attach, detach, get_encoder, parts_of, train_only
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.releases import untied
from tests.helpers.training import COVFT_PARTS, TEXTS, arguments, build, tower_name

pytestmark = pytest.mark.usefixtures("quiet")
peft = pytest.importorskip("peft")

LANGUAGE = r".*language_model.*\.q_proj"
TOWER = r".*vision_tower.*self_attn\.(q|v)_proj"
QUESTION = [Row(1, "what is left of the cup?")]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def by_covft(model):
    parts = parts_of(model)
    return {name for name in trained(model) if parts[name] in COVFT_PARTS}


def lora(model, targets=LANGUAGE, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))


@pytest.fixture(scope="module")
def batch():
    return BY_NAME["llava"].batch(build(attached=False), QUESTION).inputs


def kbit(model):
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def freeze(model):
    get_encoder(model).vit.requires_grad_(False)
    return model


@pytest.mark.parametrize("freezes", [kbit, freeze], ids=["prepare_model_for_kbit_training", "requires_grad_"])
def test_callback__raises_before_the_first_step_where_nothing_of_covft_trains(freezes, rows, tmp_path):
    model = freezes(build())
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(MissingGradientError, match="were frozen after attach") as caught:
        MLLMTrainer(model, arguments(tmp_path), train_dataset=rows).train()
    assert "unfreeze()" in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    get_encoder(model).unfreeze()
    MLLMTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows).train()


@pytest.mark.filterwarnings("ignore:All .* tensors of the adapted FFNs")
def test_callback__can_warn_of_a_frozen_tower_instead(rows, tmp_path):
    options = {"train_dataset": rows, "callbacks": [CoVFTCallback(missing_gradients="warn")]}
    trainer = MLLMTrainer(freeze(build()), arguments(tmp_path, max_steps=1), **options)
    with pytest.warns(UserWarning, match="frozen after attach"):
        trainer.train()


def test_callback__get_peft_model_after_attach_trains_the_tower_again(batch, rows, tmp_path):
    model = build()
    ours = by_covft(model)
    model = lora(model)
    assert not by_covft(model)
    with pytest.warns(UserWarning, match="are frozen, so this training does not reach them"):
        model.train()(**batch)  # a loop of one's own, without the callback
    MLLMTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows).train()
    assert {name.removeprefix("base_model.model.") for name in by_covft(model)} == ours


def test_callback__warns_where_a_part_is_frozen_unless_that_was_chosen(rows, tmp_path):
    model = build()
    get_encoder(model).slots()[1].experts.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"of \d+ tensors that covft trains are frozen: .*mlp.experts.0"):
        MLLMTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows).train()
    train_only(model, ["router"])
    MLLMTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows).train()
    train_only(model, ["projector"])  # a first stage, with a tower that is attached already
    MLLMTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows).train()
    get_encoder(model).vit.requires_grad_(False)
    train_only(model, ["projector", "covft"])
    assert by_covft(model)


@pytest.mark.parametrize("targets", [TOWER, LANGUAGE, r".*(vision_tower|language_model).*self_attn\.q_proj"])
@pytest.mark.parametrize("first", ["peft", "covft"])
def test_train_only__of_a_part_that_peft_adapts_means_its_adapters(targets, first):
    if first == "peft":
        model = attach(lora(build(attached=False), targets), TEXTS, tokenizer=BY_NAME["llava"].tokenizer)
    else:
        model = lora(build(), targets)
    parts = parts_of(model)
    unread = f"{tower_name(model)}.encoder.layers.3."  # LLaVA reads hidden_states[-2]
    adapters = {name for name in parts if "lora_" in name and unread not in name}
    for part in ("vision", "llm", "projector", "covft"):
        train_only(model, [part])
        of_part = {n for n, owner in parts.items() if owner == part or (part == "covft" and owner in COVFT_PARTS)}
        found = trained(model)
        assert found
        assert found <= of_part
        if adapters & of_part:
            assert found == adapters & of_part
        else:
            assert not any("lora_" in name for name in found)
            assert len(found) > 3


def test_train_only__of_several_adapters_trains_the_active_one():
    model = lora(build(), LANGUAGE)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=LANGUAGE))
    model.set_adapter("other")
    train_only(model, ["llm"])
    assert trained(model)
    assert all(".other." in name for name in trained(model))


def test_train_only__of_a_copy_that_peft_trains():
    model = lora(build(), LANGUAGE, modules_to_save=["multi_modal_projector"])
    train_only(model, ["projector", "llm"])
    names = [name for name in trained(model) if "multi_modal_projector" in name]
    assert names
    assert all(".modules_to_save." in name for name in names)


def test_train_only__of_prompts():
    model = peft.get_peft_model(build(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    train_only(model, ["llm"])
    assert {name.split(".")[0] for name in trained(model)} == {"prompt_encoder"}


@untied
def test_detach__of_adapters_on_the_attention_that_were_merged(batch):
    model = build(attached=False)
    adapted = lora(model, TOWER, init_lora_weights=False)
    wanted = adapted(**batch).logits.detach()
    attach(adapted, TEXTS, tokenizer=BY_NAME["llava"].tokenizer)
    assert any("vision_tower" in n and "lora_" in n for n in trained(adapted))  # still trained, beside the experts
    merged = adapted.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(detach(merged)(**batch).logits, wanted, rtol=1e-4, atol=1e-4)


def test_peft__adapters_on_the_attention_are_saved_and_loaded_beside_covft(batch, tmp_path):
    def adapted(seed):
        model = build(seed, attached=False)
        return lora(model, TOWER, init_lora_weights=False)

    model = attach(adapted(0), TEXTS, tokenizer=BY_NAME["llava"].tokenizer)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "adapters")
    get_encoder(model).save_pretrained(tmp_path / "covft")
    again = peft.PeftModel.from_pretrained(build(0, attached=False), tmp_path / "adapters", is_trainable=True)
    attach(again, TEXTS, tokenizer=BY_NAME["llava"].tokenizer, pretrained=tmp_path / "covft")
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("options", [{"targets": r".*vision_tower.*fc1"}, {"targets": "all-linear"}])
def test_attach__refuses_adapters_in_the_ffns_of_the_tower(options):
    model = lora(build(attached=False), **options)
    before = trained(model)
    with pytest.raises(UnsupportedViTError, match="peft has put adapters into"):
        attach(model, TEXTS, tokenizer=BY_NAME["llava"].tokenizer)
    assert trained(model) == before


def test_modules_to_save__of_the_tower_is_refused_in_either_order(batch, rows, tmp_path):
    model = lora(build(attached=False), modules_to_save=["vision_tower"])
    with pytest.raises(UnsupportedViTError, match=r"peft trains a copy of the vision tower \(modules_to_save\)"):
        attach(model, TEXTS, tokenizer=BY_NAME["llava"].tokenizer)
    model = lora(build(), modules_to_save=["vision_tower"])
    with pytest.raises(UnsupportedViTError, match="peft trains a copy of the vision tower"):
        model(**batch)
    with pytest.raises(UnsupportedViTError, match="peft trains a copy of the vision tower"):
        MLLMTrainer(model, arguments(tmp_path), train_dataset=rows)


def test_lora_exclude__all_linear_after_attach(rows, tmp_path):
    model: Any = build()
    slots = [module for slot in get_encoder(model).slots().values() for module in slot.modules()]
    linear = {id(m) for m in slots if isinstance(m, nn.Linear)}
    assert linear
    model = lora(model, "all-linear", exclude_modules=covft.lora_exclude(model))
    assert not any("lora_" in name for slot in get_encoder(model).slots().values() for name in slot.state_dict())
    assert any("vision_tower" in name and "lora_" in name for name in trained(model))
    train_only(model, ["llm", "vision", "covft"])  # without adapters in blocks that LLaVA does not read
    MLLMTrainer(model, arguments(tmp_path / "run", max_steps=1), train_dataset=rows).train()
    assert by_covft(model)

    without = lora(build(), "all-linear")
    with pytest.warns(UserWarning, match=r"peft has put adapters into \d+ layers of experts.*lora_exclude"):
        MLLMTrainer(without, arguments(tmp_path / "other", max_steps=1), train_dataset=rows)


def test_lora_exclude__is_one_pattern_for_the_paths_of_the_slots():
    model = build(layers=[1])
    pattern = covft.lora_exclude(model)
    inside = [name for name, _ in model.named_modules() if ".layers.1.mlp" in name and "vision_tower" in name]
    assert inside
    for name, _ in model.named_modules():
        assert bool(re.fullmatch(pattern, name)) == (name in inside)
