"""MLLMTrainer, and plain Trainer with CoVFTCallback: the same training, its checkpoints, its figures."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import covft
from covft.data import Collator
from covft.errors import CheckpointError, ConfigError, MissingGradientError, ReentrantCheckpointError
from covft.integrations import (
    RECIPES,
    CoVFTCallback,
    MLLMTrainer,
    MLLMTrainingArguments,
    attach,
    get_encoder,
    last_checkpoint,
    parts_of,
    train_only,
)
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.towers import perturb
from tests.helpers.training import arguments, build, dataset, write_folder

TEXTS = covft.testing.HashTextEncoder(16)
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _quiet():
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def rows(folder):
    return dataset(folder)


def collator(rows):
    return Collator(rows.tokenizer.pad_token_id, rows.image_shape)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# The parts of a model.


def test_parts__every_parameter_belongs_to_one():
    model = build()
    parts = parts_of(model)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    assert parts["lm_head.weight"] == "llm"
    assert parts["model.multi_modal_projector.linear_1.weight"] == "projector"
    assert parts["model.vision_tower.embeddings.patch_embedding.weight"] == "vision"
    assert parts["model.vision_tower.encoder.layers.1.mlp.experts.0.fc1.weight"] == "experts"
    assert parts["model.vision_tower.encoder.layers.1.mlp.context.image.up.weight"] == "router"
    assert parts["model.vision_tower.encoder.layers.0.layer_norm1.weight"] == "norms"
    assert parts["model.vision_tower.encoder.layers.3.layer_norm1.weight"] == "vision"  # after the last that is adapted
    plain = build(attached=False)
    assert set(parts_of(plain).values()) == {"vision", "projector", "llm"}


def test_train_only__trains_these_parts_and_no_other():
    model = build()
    owner = parts_of(model)
    before = {name for name, p in model.named_parameters() if p.requires_grad and owner[name] in covft_parts}
    counts = train_only(model, ["projector"])
    assert {owner[name] for name, p in model.named_parameters() if p.requires_grad} == {"projector"}
    assert counts == {"projector": sum(p.numel() for n, p in model.named_parameters() if owner[n] == "projector")}
    train_only(model, ["covft", "llm"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {owner[name] for name in trained} == {"experts", "router", "norms", "llm"}
    assert {name for name in trained if owner[name] in covft_parts} == before
    with pytest.raises(ConfigError, match="no part heads"):
        train_only(model, ["heads"])
    with pytest.raises(ConfigError, match="no part experts") as caught:
        train_only(build(attached=False), ["covft"])
    assert "covft.attach" in str(caught.value)


covft_parts = ("experts", "router", "norms")


def test_train_only__inside_peft_the_language_model_is_what_peft_added():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*\.q_proj")
    model = peft.get_peft_model(build(), config)
    counts = train_only(model, ["llm", "covft"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    lora = [name for name in trained if "lora_" in name]
    assert len(lora) == 4
    assert counts["llm"] == sum(dict(model.named_parameters())[name].numel() for name in lora)
    assert {parts_of(model)[name] for name in trained} == {"llm", *covft_parts}


# Training.


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


def perturb_alike(encoder):
    torch.manual_seed(11)
    perturb(encoder)


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
    assert {owner[name] for name in moved} == {"projector", "llm", *covft_parts}
    # Embeddings of words that never occur and the like may stay; nothing of the tower does.
    assert {name for name in trained if owner[name] in covft_parts} <= moved


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


@pytest.mark.parametrize("name", RECIPES)
def test_recipes__are_arguments_of_the_trainer(name, tmp_path):
    recipe = RECIPES[name]
    options = {**recipe.arguments, "use_cpu": True, "per_device_train_batch_size": 4}
    args = MLLMTrainingArguments(str(tmp_path), **options)
    assert args.gradient_accumulation_steps * 4 == recipe.arguments["global_batch_size"]
    assert args.bf16
    counts = train_only(build(), recipe.parts)
    assert all(counts.values())


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
    with pytest.raises(ConfigError, match="no collator"):
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
    assert {owner[name] for name in moved} == {"llm", *covft_parts}
    assert all("lora_" in name for name in moved if owner[name] == "llm")
    # Everything that is trained is in the checkpoint, and comes back from it.
    kept = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(state(model), kept)


# Figures and gradients.


def test_callback__logs_what_routing_does(rows, tmp_path):
    from transformers import Trainer

    model = build(experts=3)
    train_only(model, ["covft"])
    perturb(get_encoder(model))
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    weights = []

    class Watch(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            weights.append({n: w.clone() for n, w in get_encoder(self.model).routing_weights().items()})
            return loss

    trainer = Watch(model, args, collator(rows), train_dataset=rows, callbacks=[CoVFTCallback(per_layer=True)])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    # The first entry is about the first two forwards.
    entropies = []
    for layer in get_encoder(model).layers:
        both = torch.cat([weights[0][layer], weights[1][layer]])
        entropy = -(both * both.log()).sum(dim=1).mean().item()
        entropies.append(entropy)
        assert entries[0][f"covft/layer_{layer}/routing_entropy"] == pytest.approx(entropy, abs=1e-5)
        for expert, load in enumerate(both.mean(dim=0).tolist()):
            assert entries[0][f"covft/layer_{layer}/expert_load_{expert}"] == pytest.approx(load, abs=1e-5)
        assert entries[0][f"covft/layer_{layer}/gate_grad_norm"] > 0
    assert entries[0]["covft/routing_entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert 1 / 3 < entries[0]["covft/expert_load_max"] < 1
    assert 0 < entries[0]["covft/expert_load_min"] < 1 / 3
    assert entries[0]["covft/routing_entropy"] < math.log(3)


def test_trainer__reporters_see_the_figures(rows, tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    model = build()
    callbacks = [Reporter(), CoVFTCallback()]  # as transformers' own reporters, before covft's
    MLLMTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows, callbacks=callbacks).train()
    assert "covft/routing_entropy" in seen[0]
    assert "covft/gate_grad_norm" in seen[0]


def test_callback__a_parameter_without_gradient_is_an_error(rows, tmp_path):
    model = build(layers=[0, 3])  # LLaVA reads hidden_states[-2]: block 3 is never used
    with pytest.raises(MissingGradientError, match="got no gradient in the first step") as caught:
        MLLMTrainer(model, arguments(tmp_path), train_dataset=rows).train()
    assert "model.vision_tower.encoder.layers.3." in str(caught.value)
    assert "layers.0.mlp" not in str(caught.value)
    args = arguments(tmp_path, max_steps=2)
    warning, silent = (CoVFTCallback(missing_gradients=kind) for kind in ("warn", "ignore"))
    with pytest.warns(UserWarning, match="got no gradient"):
        MLLMTrainer(model, args, train_dataset=rows, callbacks=[warning]).train()
    MLLMTrainer(model, args, train_dataset=rows, callbacks=[silent]).train()


def test_callback__a_first_step_without_images_is_no_error(folder, tmp_path):
    text = write_folder(tmp_path / "text", rows=4, text_only=(0, 1, 2, 3))
    model = build()
    rows = dataset(text)
    collate = Collator(rows.tokenizer.pad_token_id, dummies="none")
    MLLMTrainer(model, arguments(tmp_path / "run", max_steps=2), collate, train_dataset=rows).train()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, ReentrantCheckpointError, "Reentrant"),
    ],
)
def test_callback__refuses_what_would_lose_gradients(changes, error, match, rows, tmp_path):
    with pytest.raises(error, match=match):
        MLLMTrainer(build(), arguments(tmp_path, **changes), train_dataset=rows)


def test_callback__refuses_settings_that_nobody_would_use(rows, tmp_path):
    with pytest.raises(ConfigError, match="does not know layer"):
        CoVFTCallback(TEXTS, layer=[1])
    with pytest.raises(ConfigError, match="missing_gradients"):
        CoVFTCallback(missing_gradients="never")
    with pytest.raises(ConfigError, match="attached already"):
        MLLMTrainer(build(), arguments(tmp_path), train_dataset=rows, callbacks=[CoVFTCallback(TEXTS, experts=2)])
    with pytest.warns(UserWarning, match="save_total_limit=1"):
        MLLMTrainer(build(), arguments(tmp_path, save_total_limit=1), train_dataset=rows)


# Checkpoints.


def saving(output, **changes):
    return arguments(output, **{"save_strategy": "steps", "save_steps": 2, **changes})


def test_checkpoint__holds_every_trained_tensor_and_a_model_that_loads(rows, tmp_path):
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration

    model = build()
    train_only(model, ["projector", "covft", "llm"])
    MLLMTrainer(model, saving(tmp_path, max_steps=2), train_dataset=rows, processing_class=rows.tokenizer).train()
    checkpoint = tmp_path / "checkpoint-2"
    owner = parts_of(model)
    tower = load_file(checkpoint / "covft" / "model.safetensors")
    outside = load_file(checkpoint / "covft" / "trained.safetensors")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    prefix = "model.vision_tower."
    assert {prefix + name for name in tower} | set(outside) == trained
    values = model.state_dict()
    assert all(torch.equal(values[name], tensor) for name, tensor in outside.items())
    assert all(torch.equal(values[prefix + name], tensor) for name, tensor in tower.items())
    assert {owner[name] for name in outside} == {"projector", "llm"}
    # The folder is a model of its own, with the tower as it was, and the adapted one beside it.
    again = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    attach(again, TEXTS, tokenizer=rows.tokenizer, pretrained=checkpoint / "covft")
    assert same(state(again), state(model))


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_checkpoint__a_resumed_run_ends_as_one_that_was_not_interrupted(kind, rows, tmp_path):
    from transformers import Trainer

    def trainer(model, output, **changes):
        args = saving(output, **changes)
        if kind == "ours":
            return MLLMTrainer(model, args, train_dataset=rows)
        return Trainer(model, args, collator(rows), train_dataset=rows, callbacks=[CoVFTCallback()])

    whole = build()
    trainer(whole, tmp_path / "whole").train()
    model = build()
    first = trainer(model, tmp_path / "cut")
    first.args.max_steps = 6
    first.add_callback(StopAt(4))
    first.train()
    again = build()
    with torch.no_grad():  # all of them have to come from the checkpoint
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    resumed = trainer(again, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert same(state(again), state(whole))
    assert not same(state(model), state(whole))


def StopAt(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    return Stop()


def test_checkpoint__the_best_model_is_loaded_with_its_tower(rows, tmp_path):
    model = build()
    perturb(get_encoder(model))
    args = saving(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=0.5
    )
    evaluated = {}
    at = {}

    class Keep(CoVFTCallback):
        def on_save(self, args, state, control, **kwargs):
            super().on_save(args, state, control, **kwargs)
            at[state.global_step] = {n: t.clone() for n, t in kwargs["model"].state_dict().items()}

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            evaluated[state.global_step] = metrics["eval_loss"]

    trainer = MLLMTrainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[Keep()])
    trainer.train()
    best = min(evaluated, key=evaluated.get)
    assert best == 2  # so fast a training gets worse
    assert same(state(model), at[2])
    assert not same(at[2], at[4])


def test_checkpoint__cut_short_is_refused_by_name(rows, tmp_path):
    model = build()
    MLLMTrainer(model, saving(tmp_path, max_steps=4), train_dataset=rows).train()
    kept = state(model)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    damaged = tmp_path / "checkpoint-4"

    def refused(match):
        fresh = build()
        before = state(fresh)
        with pytest.raises(CheckpointError, match=match) as caught:
            MLLMTrainer(fresh, saving(tmp_path), train_dataset=rows).train(resume_from_checkpoint=str(damaged))
        assert same(state(fresh), before)
        return str(caught.value)

    optimizer = damaged / "optimizer.pt"
    content = optimizer.read_bytes()
    optimizer.write_bytes(content[:-100])
    assert f"optimizer.pt of {len(content)} bytes" in refused("checkpoint-4 has changed since it was written")
    with pytest.warns(UserWarning, match="Taking checkpoint-2 instead"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    optimizer.write_bytes(content)
    weights = damaged / "covft" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1  # of the same size, so only its digest tells
    whole = weights.read_bytes()
    weights.write_bytes(bytes(flipped))
    fresh = build()
    with pytest.raises(CheckpointError, match=r"covft.model\.safetensors is not the file"):
        MLLMTrainer(fresh, saving(tmp_path), train_dataset=rows).train(resume_from_checkpoint=str(damaged))
    weights.write_bytes(whole)
    (damaged / "complete.json").unlink()
    refused("checkpoint-4 is not a complete checkpoint")
    (damaged / "complete.json").write_text("{")
    refused("is damaged")
    assert same(state(model), kept)


def test_last_checkpoint__of_a_folder_without_any(tmp_path):
    assert last_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match="None of the checkpoints"):
        last_checkpoint(tmp_path)


def test_checkpoint__other_trained_parameters_are_refused(rows, tmp_path):
    model = build()
    MLLMTrainer(model, saving(tmp_path, max_steps=2), train_dataset=rows).train()
    other = build()
    train_only(other, ["covft", "projector"])
    with pytest.raises(CheckpointError, match="language_model"):
        MLLMTrainer(other, saving(tmp_path), train_dataset=rows).train(resume_from_checkpoint=True)


def run_script(folder, output, kill_at="never", resume="anew"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.helpers.training", str(folder), str(output), kill_at, resume]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_killed__a_run_resumes_and_ends_with_the_same_weights_bit_for_bit(folder, tmp_path):
    whole = run_script(folder, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    expected = torch.load(tmp_path / "whole" / "final.pt")
    killed = run_script(folder, tmp_path / "killed", kill_at="saving 6")
    assert killed.returncode == -signal.SIGKILL
    left = sorted(entry.name for entry in (tmp_path / "killed").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]  # the last of them without an optimizer
    resumed = run_script(folder, tmp_path / "killed", kill_at="step 7", resume="resume")
    assert resumed.returncode == -signal.SIGKILL
    assert "checkpoint-6 is not a complete checkpoint" in resumed.stderr
    again = run_script(folder, tmp_path / "killed", resume="resume")
    assert again.returncode == 0, again.stderr
    found = torch.load(tmp_path / "killed" / "final.pt")
    assert same(found, expected)
    steps = json.loads((tmp_path / "killed" / "checkpoint-8" / "complete.json").read_text())
    assert steps["step"] == 8


def test_callback__takes_the_tokenizer_of_the_trainer(rows, tmp_path):
    model, callback = build(attached=False), CoVFTCallback(TEXTS)
    batch = BY_NAME["llava"].batch(model, [Row(1, "where is the dog?")])
    args = arguments(tmp_path, max_steps=1)
    MLLMTrainer(model, args, train_dataset=rows, processing_class=rows.tokenizer, callbacks=[callback]).train()
    with torch.no_grad():
        read = model(**batch.inputs).logits  # of the prompt itself, so by the tokenizer's template
        given = model(**batch.inputs, context_text=["where is the dog?"]).logits
    assert torch.equal(read, given)
