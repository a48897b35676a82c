"""Checkpoints of MLLMTrainer and of a plain Trainer with CoVFTCallback: complete, or refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from covft.checkpoints.trained import load_trained
from covft.errors import CheckpointError
from covft.integrations import (
    CoVFTCallback,
    MLLMTrainer,
    attach,
    get_encoder,
    last_checkpoint,
    parts_of,
    train_only,
)
from covft.integrations.training.checkpoints import write_trained
from covft.utils.files import write_tensors
from tests.helpers.towers import perturb
from tests.helpers.training import (
    TEXTS,
    arguments,
    build,
    collator,
    same,
    state,
)

pytestmark = pytest.mark.usefixtures("quiet")
ROOT = Path(__file__).parents[3]


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


@pytest.mark.long
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
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=0.01
    )
    evaluated = {}
    at = {}

    class Keep(CoVFTCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 4:  # so that the last checkpoint is not the best
                kwargs["model"].lm_head.weight.data.mul_(1e3)

        def on_save(self, args, state, control, **kwargs):
            super().on_save(args, state, control, **kwargs)
            at[state.global_step] = {n: t.clone() for n, t in kwargs["model"].state_dict().items()}

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            evaluated[state.global_step] = metrics["eval_loss"]

    trainer = MLLMTrainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[Keep()])
    trainer.train()
    best = min(evaluated, key=evaluated.get)
    assert best == 2
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
    for content in ("{", "[" * 100_000, '{"files": {"x": ' + "9" * 6000 + "}}"):
        (damaged / "complete.json").write_text(content)
        refused("is damaged")
    assert same(state(model), kept)


@pytest.mark.parametrize("change", [lambda t: t.fill_(torch.nan), lambda t: t.int()], ids=["nan", "int32"])
def test_trained_weights_outside_the_tower_are_numbers_of_a_training(tmp_path, change):
    folder = tmp_path / "covft"
    model = build()
    get_encoder(model).save_pretrained(folder)
    write_trained(model, folder)
    tensors = load_file(folder / "trained.safetensors")
    name = sorted(tensors)[0]
    stated = write_tensors(folder / "trained.safetensors", {**tensors, name: change(tensors[name].clone())})
    index = json.loads((folder / "trained.json").read_text())
    (folder / "trained.json").write_text(json.dumps({**index, **stated}))
    before = state(model)
    with pytest.raises(CheckpointError, match=r"not finite|not floating-point"):
        load_trained(model, folder)
    assert same(state(model), before)


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


@pytest.mark.long
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


@pytest.mark.slow
def test_killed__at_random_moments_it_resumes_and_ends_with_the_same_weights(folder, tmp_path):
    start = time.perf_counter()
    whole = run_script(folder, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    seconds = (time.perf_counter() - start) / 4  # most of it is imports
    kills, resume = 0, "anew"
    for _ in range(40):
        moment = f"after {random.uniform(0, seconds)}" if kills < 8 else "never"
        run = run_script(folder, tmp_path / "killed", moment, resume)
        kills += run.returncode == -signal.SIGKILL
        if run.returncode == 0 and kills == 8:
            break
        if run.returncode == 0:  # it was over before the kill: begin again, over what is there
            resume = "anew"
        elif run.returncode == -signal.SIGKILL:
            resume = "resume"
        else:  # killed before the first checkpoint was complete
            assert "None of the checkpoints" in run.stderr, run.stderr
            resume = "anew"
    assert kills == 8
    assert same(torch.load(tmp_path / "killed" / "final.pt"), torch.load(tmp_path / "whole" / "final.pt"))
