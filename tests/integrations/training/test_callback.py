"""CoVFTCallback: figures of the routing, the check of gradients, and refused settings."""

from __future__ import annotations

import math

import pytest
import torch

import covft
from covft.data import Collator
from covft.errors import ConfigError, MissingGradientError, ReentrantCheckpointError
from covft.integrations import (
    CoVFTCallback,
    MLLMTrainer,
    get_encoder,
    train_only,
)
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.recomputing import training_fields
from tests.helpers.towers import perturb
from tests.helpers.training import (
    TEXTS,
    arguments,
    build,
    collator,
    dataset,
    tower_name,
    write_folder,
)

pytestmark = pytest.mark.usefixtures("quiet")


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
    model = build(attached=False)
    model.config.vision_feature_layer = -1
    covft.attach(model, TEXTS, tokenizer=BY_NAME["llava"].tokenizer, layers=[0, 3])
    model.config.vision_feature_layer = -2  # from now on, block 3 is not read
    with pytest.raises(MissingGradientError, match="got no gradient in the first step") as caught:
        MLLMTrainer(model, arguments(tmp_path), train_dataset=rows).train()
    assert f"{tower_name(model)}.encoder.layers.3." in str(caught.value)
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
        (training_fields(reentrant=True), ReentrantCheckpointError, "Reentrant"),
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


def test_callback__takes_the_tokenizer_of_the_trainer(rows, tmp_path):
    model, callback = build(attached=False), CoVFTCallback(TEXTS)
    batch = BY_NAME["llava"].batch(model, [Row(1, "where is the dog?")])
    args = arguments(tmp_path, max_steps=1)
    MLLMTrainer(model, args, train_dataset=rows, processing_class=rows.tokenizer, callbacks=[callback]).train()
    with torch.no_grad():
        read = model(**batch.inputs).logits  # of the prompt itself, so by the tokenizer's template
        given = model(**batch.inputs, context_text=["where is the dog?"]).logits
    assert torch.equal(read, given)
