"""Trainers, callback, checkpoints and command lines take every method."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.errors import CheckpointError, ConfigError, MissingGradientError
from covft.integrations import CoVFTCallback, MLLMTrainer, get_encoder, parts_of, train_only
from covft.integrations.codebases.launch import parse
from tests.helpers.training import TEXTS, arguments, build, collator, losses, same, state
from tests.helpers.tuned import OPTIONS

pytestmark = pytest.mark.usefixtures("quiet")


def tuned(method, rows):
    model = build(attached=False)
    return covft.tune(
        model,
        method,
        text_encoder=TEXTS,
        tokenizer=rows.tokenizer,
        language="full",
        projector=True,
        **OPTIONS.get(method, {}),
    )


def trainer_of(model, rows, output, **changes):
    args = arguments(output, save_strategy="steps", save_steps=2, max_steps=4, **changes)
    return MLLMTrainer(model, args, train_dataset=rows, processing_class=rows.tokenizer)


@pytest.mark.parametrize("method", ["lora", "bitfit", "adaln", pytest.param("q_moe", marks=pytest.mark.long)])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(method, rows, tmp_path):
    whole = tuned(method, rows)
    before = state(whole)
    trained = set(get_encoder(whole).adapted_parameters())
    trainer_of(whole, rows, tmp_path).train()
    prefix = next(n for n, _ in whole.named_modules() if whole.get_submodule(n) is get_encoder(whole).vit)
    moved = {n.removeprefix(f"{prefix}.") for n, t in whole.state_dict().items() if not torch.equal(t, before[n])}
    assert trained <= moved | {name for name in trained if "k_proj.bias" in name}
    resumed = tuned(method, rows)
    for parameter in get_encoder(resumed).trainable_parameters():
        parameter.data.mul_(0.5)  # the checkpoint has them all
    trainer_of(resumed, rows, tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert same(state(resumed), state(whole))


@pytest.mark.long
@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_a_tower_in_half_precision_is_kept_in_float32_and_resumed(method, rows, tmp_path):
    """At LLaVA's learning rate: the callback, which would warn after ten steps, does not."""

    def run(**options):
        model = build(attached=False).bfloat16()
        covft.tune(model, method, language="frozen", projector=False)
        args = arguments(tmp_path, save_strategy="steps", save_steps=6, max_steps=12, learning_rate=2e-5)
        trainer = MLLMTrainer(model, args, train_dataset=rows, processing_class=rows.tokenizer)
        assert {p.dtype for p in get_encoder(model).trainable_parameters()} == {torch.float32}
        trainer.train(**options)
        return state(model)

    whole = run()
    assert same(run(resume_from_checkpoint=tmp_path / "checkpoint-6"), whole)


def test_a_checkpoint_of_another_method_or_option_is_refused(rows, tmp_path):
    trainer_of(tuned("lora", rows), rows, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(CheckpointError, match="other settings") as error:
        trainer_of(tuned("bitfit", rows), rows, tmp_path).train(resume_from_checkpoint=checkpoint)
    assert "method='lora'" in str(error.value)
    other = covft.tune(build(attached=False), "lora", r=3)
    with pytest.raises(CheckpointError, match="r=2"):
        trainer_of(other, rows, tmp_path).train(resume_from_checkpoint=checkpoint)


def test_the_callback_tunes_and_a_plain_trainer_trains(rows, tmp_path):
    from transformers import Trainer

    model = build(attached=False)
    callback = CoVFTCallback(TEXTS, method="cross_attention", heads=2)
    args = arguments(tmp_path, max_steps=2, remove_unused_columns=False)
    trainer = Trainer(
        model,
        args,
        data_collator=collator(rows),
        train_dataset=rows,
        processing_class=rows.tokenizer,
        callbacks=[callback],
    )
    encoder = get_encoder(model)
    assert encoder.method.name == "cross_attention"
    gates = {n: p.detach().clone() for n, p in encoder.adapted_parameters().items() if n.endswith("gate")}
    trainer.train()
    assert len(losses(trainer)) == 2
    assert all(not torch.equal(p, gates[n]) for n, p in encoder.adapted_parameters().items() if n in gates)


def test_wrong_callbacks_say_so():
    with pytest.raises(ConfigError, match="does not know rank"):
        CoVFTCallback(method="lora", rank=3)
    with pytest.raises(ConfigError, match="nothing"):
        CoVFTCallback(method="nothing")
    with pytest.raises(ConfigError, match="does not know r"):
        CoVFTCallback(TEXTS, r=3)


def test_a_frozen_method_is_noticed_before_the_first_step(rows, tmp_path):
    model = tuned("lora", rows)
    get_encoder(model).vit.requires_grad_(False)
    with pytest.raises(MissingGradientError, match="'lora' trains"):
        trainer_of(model, rows, tmp_path).train()
    get_encoder(model).unfreeze()
    trainer_of(model, rows, tmp_path, learning_rate=1e-3).train()


def test_train_only_means_what_the_method_trains(rows):
    model = tuned("bitfit", rows)
    wanted = set(get_encoder(model).adapted_parameters())
    counts = train_only(model, ["vision", "projector"])
    trained = {n for n, p in get_encoder(model).vit.named_parameters() if p.requires_grad}
    assert trained == wanted
    assert set(counts) == {"vision", "projector"}
    assert all(parts_of(model)[n] in counts for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="no part"):
        train_only(model, ["covft"])


def test_launchers_read_a_method_and_its_options():
    flags = parse("covft.llava", ["--covft_method", "lora", "--covft_option", "r=16", "--", "train.py", "--x"])
    assert (flags.method, flags.settings, flags.arguments) == ("lora", {"r": 16}, ["--x"])
    flags = parse("covft.llava", ["--covft_method=lora", "--covft_option=targets=ffn", "--", "train.py"])
    assert flags.settings == {"targets": "ffn"}
    with pytest.raises(ConfigError, match="settings of covft"):
        parse("covft.llava", ["--covft_method", "lora", "--covft_layers", "1", "--", "train.py"])
    with pytest.raises(ConfigError, match="cannot be options of covft"):
        parse("covft.llava", ["--covft_option", "r=16", "--", "train.py"])
    assert parse("covft.llava", ["--", "train.py"]).method == "covft"
