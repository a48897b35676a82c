"""Resuming with other settings: refused by name before anything of the checkpoint is loaded."""

from __future__ import annotations

import shutil

import pytest
import torch

from covft.errors import CheckpointError
from covft.integrations import CoVFTCallback, MLLMTrainer, check_checkpoint, train_only
from tests.helpers.training import arguments, build, collator, same, state

pytestmark = pytest.mark.usefixtures("quiet")
SETTINGS = {"layers": [1, 2], "experts": 3}


def trainer_of(kind, model, rows, output, **changes):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, **changes}
    if kind == "ours":
        return MLLMTrainer(model, arguments(output, **changes), train_dataset=rows)
    from transformers import Trainer

    args = arguments(output, **changes)
    return Trainer(model, args, collator(rows), train_dataset=rows, callbacks=[CoVFTCallback()])


def lora(model, **settings):
    peft = pytest.importorskip("peft")
    config = {"r": 2, "lora_alpha": 4, "target_modules": r".*language_model.*\.(q|v)_proj", **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


@pytest.fixture(scope="module")
def checkpoints(rows, tmp_path_factory):
    """A checkpoint of a run without LoRA, and one with."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("full", "lora"):
        model = build(**SETTINGS)
        trainer_of("plain", lora(model) if name == "lora" else model, rows, folder / name).train()
    return {name: folder / name / "checkpoint-1" for name in ("full", "lora")}


def refused(kind, model, rows, checkpoint, output):
    before, trainer = state(model), trainer_of(kind, model, rows, output, max_steps=2)
    with pytest.raises(CheckpointError) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert same(state(model), before)
    return caught.value


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["plain", "ours"])
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("experts", 3, 2),
        ("train_norms", "all", "none"),
        ("layers", (1, 2), (0, 2)),
        ("routing", "dense", "sparse"),
        ("context", "cve", "concat"),
        ("expert_rank", None, 2),
        ("attention_rank", None, 2),
    ],
)
def test_another_setting_is_named_with_both_values(kind, name, old, new, rows, checkpoints, tmp_path):
    error = refused(kind, build(**{**SETTINGS, name: new}), rows, checkpoints["full"], tmp_path)
    assert "is of a run with other settings" in str(error)
    assert f"{name}={old!r}" in error.expected
    assert f"{name}={new!r}" in error.got
    assert error.got.count("=") == 1


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_another_lora_is_named_with_both_values(kind, rows, checkpoints, tmp_path):
    changed = {
        "r": (2, 4),
        "lora_alpha": (4, 8),
        "target_modules": (r".*language_model.*\.(q|v)_proj", r".*language_model.*\.q_proj"),
        "use_dora": (None, True),
    }
    for name, (old, new) in changed.items():
        error = refused(kind, lora(build(**SETTINGS), **{name: new}), rows, checkpoints["lora"], tmp_path)
        assert f"{name}={old!r}" in error.expected
        assert f"{name}={new!r}" in error.got
        assert error.got.count("=") == 1
    if kind == "ours":  # the plain Trainer misses the weights of the model first
        error = refused(kind, build(**SETTINGS), rows, checkpoints["lora"], tmp_path)
        assert "peft_type='LORA'" in error.expected
        assert "peft_type=None" in error.got
    error = refused(kind, lora(build(**SETTINGS)), rows, checkpoints["full"], tmp_path)
    assert "peft_type='LORA'" in error.got


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_other_trained_parameters_are_named(kind, rows, checkpoints, tmp_path):
    model = build(**SETTINGS)
    train_only(model, ["projector", "llm", "experts"])
    error = refused(kind, model, rows, checkpoints["full"], tmp_path)
    assert "unexpected" in str(error)
    assert "mlp.router.gate.weight" in str(error)
    model = build(**SETTINGS)
    train_only(model, ["covft", "projector"])
    assert "language_model" in str(refused(kind, model, rows, checkpoints["full"], tmp_path))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", ["full", "lora"])
def test_equal_settings_resume_on_another_device_map(name, rows, checkpoints, tmp_path):
    """Where the modules are is no setting: values go to the device of each tensor."""
    from accelerate import dispatch_model

    ends = []
    for device_map in (None, {"": "cpu"}):
        model = build(**SETTINGS)
        if device_map:
            model = dispatch_model(model, device_map, force_hooks=True)
        trained = lora(model) if name == "lora" else model
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        output = tmp_path / str(device_map is None)
        shutil.copytree(checkpoints[name], output / "checkpoint-1")
        trainer_of("plain", trained, rows, output, max_steps=2).train(resume_from_checkpoint=True)
        ends.append(state(trained))
    assert same(*ends)


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_a_checkpoint_that_is_overwritten_is_incomplete_until_it_is_whole(kind, rows, checkpoints, tmp_path):
    shutil.copytree(checkpoints["full"], tmp_path / "checkpoint-1")
    check_checkpoint(tmp_path / "checkpoint-1")
    trainer = trainer_of(kind, build(**SETTINGS), rows, tmp_path)

    def killed(*_, **__):
        raise KeyboardInterrupt

    trainer.save_model = killed  # the first step of a checkpoint
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        check_checkpoint(tmp_path / "checkpoint-1")
