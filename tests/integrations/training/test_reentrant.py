"""Reentrant checkpointing: made non-reentrant where it is a default, refused by the key of the trainer where not."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from covft.errors import ReentrantCheckpointError
from covft.integrations import CoVFTCallback
from covft.integrations.training.reentrant import check_tower, key_of, without_reentrant
from covft.testing import tiny_llava
from tests.helpers.recomputing import recompute

transformers = pytest.importorskip("transformers", minversion="4.57")


def arguments_of(module, *bases, **fields):
    """Arguments whose class is in `module`, as a library's own subclass of TrainingArguments is."""
    cls = type("Arguments", bases, {"__module__": module})
    made = cls()
    vars(made).update(fields)
    return made


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("llamafactory.hparams.training_args", "use_reentrant_gc: false"),
        ("swift.trainers.arguments", "--gradient_checkpointing_kwargs '{\"use_reentrant\": false}'"),
        ("trl.trainer.sft_config", "gradient_checkpointing_kwargs={'use_reentrant': False}"),
        ("llava.train.train", "--gradient_checkpointing_kwargs"),
        ("my_script", "gradient_checkpointing_kwargs={'use_reentrant': False}"),
    ],
)
def test_the_key_is_that_of_the_trainer(module, key):
    made = arguments_of(module, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert key_of(made).startswith(key)
    with pytest.raises(ReentrantCheckpointError) as raised:
        without_reentrant(made)
    assert raised.value.fix == key_of(made)


def test_the_key_of_a_users_subclass_is_that_of_the_library_below():
    base = type(arguments_of("llamafactory.hparams.training_args"))
    assert key_of(arguments_of("my_script", base)).startswith("use_reentrant_gc")


def test_a_default_becomes_non_reentrant_and_other_options_stay():
    on = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs={"debug": True})
    without_reentrant(on)
    assert on.gradient_checkpointing_kwargs == {"debug": True, "use_reentrant": False}
    off = SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None)
    without_reentrant(off)
    assert off.gradient_checkpointing_kwargs is None
    tower_only = SimpleNamespace(
        gradient_checkpointing=False, vit_gradient_checkpointing=True, gradient_checkpointing_kwargs=None
    )  # as in ms-swift
    without_reentrant(tower_only)
    assert tower_only.gradient_checkpointing_kwargs == {"use_reentrant": False}


class Rerun(torch.autograd.Function):
    """Recomputes in backward; its forward runs without gradients, as that of every autograd function."""


@functools.wraps(checkpoint)
def around_checkpoint(*args, **kwargs):
    raise AssertionError("not called")


around_checkpoint.__wrapped__ = functools.partial(checkpoint, use_reentrant=True)  # as LLaMA-Factory wraps it


@pytest.mark.parametrize(
    "function",
    [functools.partial(checkpoint, use_reentrant=True), around_checkpoint, Rerun.apply],
    ids=["plain", "wrapped", "own"],
)
def test_a_tower_with_it_is_refused_before_training(function, tmp_path):
    tiny = tiny_llava()
    tiny.model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback = CoVFTCallback("hash:16", tokenizer=tiny.tokenizer)
    with pytest.raises(ReentrantCheckpointError, match="switched on before the trainer") as raised:
        transformers.Trainer(tiny.model, arguments, callbacks=[callback])
    assert raised.value.fix == key_of(arguments)


def test_a_tower_that_the_trainer_will_set_anew_is_not():
    model = tiny_llava().model
    on = SimpleNamespace(gradient_checkpointing=True)
    off = SimpleNamespace(gradient_checkpointing=False)
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=functools.partial(checkpoint, use_reentrant=True)
    )
    check_tower(model, on)
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=functools.partial(checkpoint, use_reentrant=False)
    )
    check_tower(model, off)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # torch 2.8
def test_the_error_of_a_step_names_the_key_too(tmp_path):
    tiny = tiny_llava()
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    type_of_library = type("Arguments", (transformers.TrainingArguments,), {"__module__": "llamafactory.hparams"})
    arguments.__class__ = type_of_library
    transformers.Trainer(tiny.model, arguments, callbacks=[CoVFTCallback("hash:16", tokenizer=tiny.tokenizer)])
    recompute(tiny.model.train(), reentrant=True)
    with pytest.raises(ReentrantCheckpointError) as raised:
        tiny.model(**tiny.batch(["what is it?"], answers=["a cup"]))
    assert raised.value.fix.startswith("use_reentrant_gc: false")
