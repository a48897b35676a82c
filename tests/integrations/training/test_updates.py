"""How far the updates of a tower agree, as the Trainer's callback logs it on request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import covft
from covft.errors import ConfigError
from covft.integrations import CoVFTCallback, get_encoder, train_only
from covft.integrations.training.updates import KEPT, UpdateMonitor
from tests.helpers.towers import perturb
from tests.helpers.training import arguments, build, collator

pytestmark = pytest.mark.usefixtures("quiet")


def naive_cosines(rows):
    """By a singular value decomposition of the gradients themselves, in float64."""
    rows = np.stack(rows).astype(np.float64)
    direction = np.linalg.svd(rows, full_matrices=False)[2][0]
    cosines = rows @ direction / np.linalg.norm(rows, axis=1)
    return cosines * np.sign(cosines.sum())


@pytest.mark.long
@pytest.mark.parametrize("method", ["covft", "full"])
def test_trainer_logs_the_cosines_of_every_other_update(method, rows, tmp_path):
    from transformers import Trainer, TrainerCallback

    model = build(attached=method == "covft")
    if method == "covft":
        train_only(model, ["covft"])
        perturb(get_encoder(model))
    else:
        covft.tune(model, "full", language="frozen")
    tower, seen = get_encoder(model).vit, []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found = [p.grad.flatten() for p in tower.parameters() if p.requires_grad and p.grad is not None]
            seen.append(torch.cat(found).numpy().copy())

    args = arguments(tmp_path, max_steps=17, gradient_accumulation_steps=2, max_grad_norm=0.5)
    callbacks = [CoVFTCallback(conflict_every=2), Watch()]
    trainer = Trainer(model, args, collator(rows), train_dataset=rows, callbacks=callbacks)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("covft/updates") for entry in entries[:14]] == [None] * 14, "fewer than eight say nothing"
    expected = naive_cosines(seen[::2])
    assert entries[-1]["covft/updates"] == 9
    assert entries[-1]["covft/update_cosine"] == pytest.approx(expected.mean(), abs=0.03)
    assert entries[-1]["covft/update_cosine_std"] == pytest.approx(expected.std(ddof=1), abs=0.03)


def test_nothing_is_measured_unless_asked_for(rows, tmp_path):
    from transformers import Trainer

    model = build()
    train_only(model, ["covft"])
    callback = CoVFTCallback()
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), collator(rows), train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert not any(name.startswith("covft/update") for entry in trainer.state.log_history for name in entry)


def gradients(parameter, rows):
    monitor = UpdateMonitor([("weight", parameter)], every=1)
    for step, row in enumerate(rows):
        parameter.grad = row
        monitor.note(step)
    return monitor


def test_memory_is_bounded_and_bad_gradients_are_left_out():
    parameter, direction = nn.Parameter(torch.zeros(40)), torch.randn(40)
    good = [direction + 0.1 * torch.randn(40) for _ in range(KEPT + 5)]
    monitor = gradients(parameter, [torch.full((40,), torch.inf), torch.zeros(40), -direction, *good])
    assert monitor.figures()["covft/updates"] == KEPT
    assert monitor.cosines().min() > 0.8, "the oldest, which is opposed, is forgotten"
    few = gradients(parameter, [torch.full((40,), torch.nan), torch.zeros(40), *good[:7]])
    assert few.figures() == {}


def test_sharded_gradients_and_wrong_numbers_are_refused():
    class Sharded(nn.Parameter):
        def full_tensor(self):
            raise AssertionError

    with pytest.raises(ConfigError, match=r"(?s)whole gradients.*weight is sharded.*conflict_every=None"):
        UpdateMonitor([("weight", Sharded(torch.zeros(3)))], every=1)
    with pytest.raises(ConfigError, match="conflict_every=0"):
        CoVFTCallback(conflict_every=0)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_are_refused_before_the_model_is_attached(engine, rows, tmp_path, monkeypatch):
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainerControl, TrainerState

    model = build(attached=False)
    args = arguments(tmp_path)
    Trainer(model, args, collator(rows), train_dataset=rows)  # sets accelerate up
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[engine])
    callback = CoVFTCallback(covft.testing.HashTextEncoder(16), conflict_every=5)
    with pytest.raises(ConfigError, match=f"(?s)whole gradients.*{engine}"):
        callback.on_init_end(args, TrainerState(), TrainerControl(), model=model)
    assert covft.integrations.mllm.attachment.attachment_of(model) is None
