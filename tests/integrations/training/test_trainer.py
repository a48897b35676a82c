"""MLLMTrainer: the training of a plain Trainer with CoVFTCallback, with learning rates for each part."""

from __future__ import annotations

import pytest
import torch

from covft.errors import ConfigError
from covft.integrations import (
    RECIPES,
    CoVFTCallback,
    MLLMTrainer,
    attach,
    get_encoder,
    parts_of,
    train_only,
)
from tests.helpers.towers import perturb
from tests.helpers.training import (
    COVFT_PARTS,
    TEXTS,
    arguments,
    build,
    collator,
    losses,
    perturb_alike,
    same,
    state,
)

pytestmark = pytest.mark.usefixtures("quiet")


def test_trainer__and_plain_trainer_with_the_callback_have_the_same_losses(rows, tmp_path):
    from transformers import Trainer

    torch.manual_seed(3)
    runs = []
    for kind in ("ours", "plain"):
        model = build(attached=False)
        callback = CoVFTCallback(TEXTS, tokenizer=rows.tokenizer)
        torch.manual_seed(5)  # the routers are drawn when the callback attaches
        args = arguments(tmp_path / kind, weight_decay=0.1)
        if kind == "ours":
            trainer = MLLMTrainer(model, args, train_dataset=rows, callbacks=[callback])
        else:
            trainer = Trainer(model, args, collator(rows), train_dataset=rows, callbacks=[callback])
        perturb_alike(get_encoder(model))
        trainer.train()
        runs.append((losses(trainer), state(model)))
    (ours, one), (plain, other) = runs
    assert len(ours) == 6
    assert ours == pytest.approx(plain, abs=1e-5)
    assert len({round(loss, 4) for loss in ours}) > 3
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_trainer__moves_what_is_trained_and_nothing_else(rows, tmp_path):
    model = build()
    train_only(model, RECIPES["llava-finetune"].parts)
    perturb(get_encoder(model))
    before = state(model)
    MLLMTrainer(model, arguments(tmp_path, max_steps=3, experts_lr=1e-2), train_dataset=rows).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    owner = parts_of(model)
    assert moved <= trained
    assert {owner[name] for name in moved} == {"projector", "llm", *COVFT_PARTS}
    # Embeddings of words that never occur and the like may stay; nothing of the tower does.
    assert {name for name in trained if owner[name] in COVFT_PARTS} <= moved


def test_trainer__stage_one_of_a_model_that_is_not_attached(rows, tmp_path):
    model = build(attached=False)
    train_only(model, RECIPES["llava-pretrain"].parts)
    before = state(model)
    trainer = MLLMTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows)
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)


def test_trainer__has_a_learning_rate_for_every_part(rows, tmp_path):
    model = build()
    rates = {"experts_lr": 1e-2, "router_lr": 2e-2, "norms_lr": 3e-2, "projector_lr": 4e-2}
    args = arguments(tmp_path, weight_decay=0.5, **rates)
    trainer = MLLMTrainer(model, args, train_dataset=rows)
    groups = trainer.create_optimizer().param_groups
    owner, names = parts_of(model), {id(p): name for name, p in model.named_parameters()}
    seen = []
    for group in groups:
        part, decay = group["name"].split("/")
        assert group["lr"] == rates.get(f"{part}_lr", args.learning_rate)
        assert group["weight_decay"] == (0.5 if decay == "decay" else 0.0)
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert owner[name] == part
            assert (decay == "decay") == (parameter.dim() > 1)
    assert sorted(seen) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_trainer__accumulated_gradients_are_those_of_the_whole_batch(rows, tmp_path):
    """Answers are of uneven length, so a mean of means would be another loss."""
    grown = []
    for at_once in (4, 1):
        model = build().double()
        perturb_alike(get_encoder(model))
        seen = {}

        class Keep(CoVFTCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                super().on_pre_optimizer_step(args, state, control, **kwargs)
                named = kwargs["model"].named_parameters()
                seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})  # noqa: B023

        args = arguments(
            tmp_path / str(at_once),
            max_steps=1,
            per_device_train_batch_size=at_once,
            global_batch_size=4,
            max_grad_norm=0.0,
        )
        assert args.gradient_accumulation_steps == 4 // at_once
        MLLMTrainer(model, args, train_dataset=rows, callbacks=[Keep()]).train()
        grown.append(seen)
    whole, accumulated = grown
    assert whole.keys() == accumulated.keys()
    assert any(".router." in name and whole[name].abs().max() > 0 for name in whole)
    for name in whole:
        assert torch.allclose(whole[name], accumulated[name], rtol=1e-9, atol=1e-12)


def test_arguments__a_global_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be divided evenly"):
        arguments(tmp_path, per_device_train_batch_size=4, global_batch_size=6)


def test_trainer__groups_rows_by_modality(rows, tmp_path):
    seen = []

    class Watch(MLLMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["image_flags"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, group_by_modality_length=True)
    Watch(build(), args, train_dataset=rows).train()
    assert sorted(map(tuple, seen)) == [(0,)] + [(1, 1)] * 5  # one dummy for a batch without any image
    with pytest.raises(ConfigError, match="needs the lengths"):
        MLLMTrainer(build(), args, collator(rows), train_dataset=[rows[0]]).get_train_dataloader()


def test_trainer__needs_a_collator_for_other_data(tmp_path):
    with pytest.raises(ConfigError, match="collator is missing"):
        MLLMTrainer(build(), arguments(tmp_path), train_dataset=[1, 2])


@pytest.mark.parametrize("first", ["peft", "covft"])
def test_trainer__lora_on_the_language_model_in_either_order(first, rows, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj")
    if first == "peft":
        model = peft.get_peft_model(build(attached=False), config)
        attach(model, TEXTS, tokenizer=rows.tokenizer)
    else:
        model = peft.get_peft_model(build(), config)
    perturb(get_encoder(model))
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = MLLMTrainer(model, args, train_dataset=rows)
    before = state(model)
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    owner = parts_of(model)
    assert {owner[name] for name in moved} == {"llm", *COVFT_PARTS}
    assert all("lora_" in name for name in moved if owner[name] == "llm")
    # Everything that is trained is in the checkpoint, and comes back from it.
    kept = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(state(model), kept)
