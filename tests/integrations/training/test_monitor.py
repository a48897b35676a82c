"""What is logged of sparse routing and of the experts, and the load-balancing loss in the Trainer."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

from covft.integrations import CoVFTCallback, MLLMTrainer, get_encoder
from covft.integrations.training.monitor import RoutingMonitor, expert_distance
from tests.helpers.towers import perturb
from tests.helpers.training import arguments, build

pytestmark = pytest.mark.usefixtures("quiet")
SPARSE = {"routing": "sparse", "experts": 3, "top_k": 2, "layers": [1, 2]}


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_balance_loss__of_a_model_whose_forward_was_replaced_is_added_once(rows, tmp_path):
    """TRL puts its own forward over that of the model, once the Trainer exists, and calls the base model."""
    model = build(**SPARSE)
    trainer = MLLMTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows)
    own = model.forward
    seen = []

    def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        hidden = self.model(*args, **{k: v for k, v in kwargs.items() if k != "num_tiles"}).last_hidden_state
        logits = self.lm_head(hidden)
        loss = self.loss_function(logits, labels, self.config.text_config.vocab_size)
        seen.append(loss.item())
        return {"loss": loss}

    model.forward = types.MethodType(forward, model)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, plain in zip(logged, seen, strict=True):
        assert entry["loss"] == pytest.approx(plain + 0.01 * entry["covft/load_balance_loss"], abs=1e-4)
    assert own is not model.forward
    assert model.forward.__func__ is forward  # what was put around it is gone


@pytest.mark.parametrize("steps", [1, 2])
def test_balance_loss__is_logged_and_accumulates_to_a_mean(steps, rows, tmp_path):
    logged = {}
    for factor in (0.0, 10.0):
        model = build(**SPARSE, router_aux_loss_coef=factor)
        options = {"max_steps": 1, "gradient_accumulation_steps": steps, "learning_rate": 1e-9}
        trainer = MLLMTrainer(model, arguments(tmp_path / str(factor), **options), train_dataset=rows)
        trainer.train()
        (logged[factor],) = entries(trainer)
    balance = logged[10.0]["covft/load_balance_loss"]
    assert balance == pytest.approx(logged[0.0]["covft/load_balance_loss"], rel=1e-4)
    assert 1 <= balance < 3
    # The metric weighs micro-batches equally, and includes dummies; the loss weighs them by their tokens.
    assert logged[10.0]["loss"] - logged[0.0]["loss"] == pytest.approx(10 * balance, rel=0.15)


def test_balance_loss__is_missed_where_the_loss_comes_from_elsewhere(rows, tmp_path):
    args = arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1)
    trainer = MLLMTrainer(build(**SPARSE), args, train_dataset=rows)
    with pytest.warns(UserWarning, match="load-balancing loss of sparse routing was not added"):
        trainer.train()
    MLLMTrainer(build(**SPARSE, router_aux_loss_coef=0), args, train_dataset=rows).train()


@pytest.mark.parametrize("expert_rank", [None, 2])
def test_expert_distance__by_hand(expert_rank):
    encoder = get_encoder(build(experts=3, expert_rank=expert_rank, layers=[1, 2]))
    slot = encoder.slots()[1]
    assert expert_distance(slot) < 1e-7
    perturb(encoder)
    if expert_rank is None:
        weights = [torch.cat([e.fc1.weight.flatten(), e.fc2.weight.flatten()]).double() for e in slot.experts]
        size = sum(w.square().sum() for w in weights)
    else:
        shared = (slot.experts.shared.fc1.weight, slot.experts.shared.fc2.weight)
        size = 3 * sum(w.double().square().sum() for w in shared)
        parts = slot.experts.differences
        weights = [torch.cat([(d.up[e] @ d.down[e]).flatten() for d in parts]).double() for e in range(3)]
    mean = sum(weights) / 3
    wanted = (sum((w - mean).square().sum() for w in weights) / size).sqrt().item()
    assert wanted > 0.04
    assert expert_distance(slot) == pytest.approx(wanted, rel=1e-4)
    assert expert_distance(get_encoder(build(experts=1)).slots()[1]) is None


def test_expert_distance__is_logged(rows, tmp_path):
    model = build(layers=[1, 2])
    callback = CoVFTCallback(per_layer=True)
    trainer = MLLMTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows, callbacks=[callback])
    trainer.train()
    last = entries(trainer)[-1]
    apart = {layer: expert_distance(slot) for layer, slot in get_encoder(model).slots().items()}
    for layer, distance in apart.items():
        assert distance > 1e-4
        assert last[f"covft/layer_{layer}/expert_distance"] == pytest.approx(distance)
    assert last["covft/expert_distance"] == pytest.approx(sum(apart.values()) / 2)
    assert "covft/load_balance_loss" not in last


def test_separation__warns_once_if_experts_stay_equal():
    encoder = get_encoder(build(layers=[1, 2]))
    monitor = RoutingMonitor(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.figures()
        monitor.check_separation(99)
        with pytest.warns(UserWarning, match="experts are still equal after 100 steps"):
            monitor.check_separation(100)
        monitor.check_separation(101)
        perturb(encoder)
        apart = RoutingMonitor(encoder)
        apart.figures()
        apart.check_separation(1000)
        for kind in ({"routing": "uniform"}, {"experts": 1}):
            other = RoutingMonitor(get_encoder(build(**kind)))
            other.figures()
            other.check_separation(1000)
        frozen = get_encoder(build())
        frozen.vit.requires_grad_(False)
        silent = RoutingMonitor(frozen)
        silent.figures()
        silent.check_separation(1000)
