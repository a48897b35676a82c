"""The load-balancing loss of sparse routing in the loss of an attached model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from covft.errors import ConfigError
from covft.integrations import attach, get_encoder
from tests.helpers.attached import CUP, PEOPLE, TEXTS, attached
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.recomputing import recompute

pytestmark = pytest.mark.usefixtures("quiet")
ROWS = [Row(1, CUP), Row(2, PEOPLE), Row(1, "a dog, and where?")]
SPARSE = {"routing": "sparse", "experts": 3, "top_k": 1, "layers": [1, 2]}


def labelled(batch):
    return {**batch.inputs, "labels": batch.inputs["input_ids"].clone()}


def sparse(rows=ROWS, **settings):
    model, batch = attached("llava", rows, **{**SPARSE, **settings})
    return model.train(), labelled(batch)


def switch_loss(encoder, rows=slice(None)):
    """Equations 4 to 6 of Switch Transformers, the mean over layers, in float64."""
    losses = []
    for slot in encoder.slots().values():
        logits = slot.record.routing.logits_BE.double()[rows]
        experts = logits.shape[1]
        probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        chosen = [int(row.argmax()) for row in logits]
        shares = [chosen.count(e) / len(chosen) for e in range(experts)]
        losses.append(experts * sum(f * probabilities[:, e].mean() for e, f in enumerate(shares)))
    return sum(losses) / len(losses)


def router_grads(model):
    slots = get_encoder(model).slots().values()
    return [p.grad.clone() for slot in slots for p in slot.router.parameters()]


def run(model, inputs, *, by_hand=0.0):
    """The loss, and the gradients of the routers."""
    model.zero_grad()
    loss = model(**inputs).loss
    if by_hand:
        loss = loss + by_hand * switch_loss(get_encoder(model))
    loss.backward()
    return loss.detach().double(), router_grads(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_balance__is_in_the_loss_and_in_the_gradients(checkpointing):
    torch.manual_seed(0)
    model, inputs = sparse(router_aux_loss_coef=0)
    plain, _ = run(model, inputs)
    wanted, wanted_grads = run(model, inputs, by_hand=0.7)
    assert wanted > plain + 0.1
    encoder = get_encoder(model)
    encoder.covft_config = encoder.covft_config.replace(router_aux_loss_coef=0.7)
    if checkpointing:
        recompute(model)
    loss, grads = run(model, inputs)
    torch.testing.assert_close(loss, wanted.double(), rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0].double(), wanted.double(), rtol=1e-5, atol=1e-6)


def test_balance__is_part_of_training_alone():
    model, inputs = sparse()
    trained = model(**inputs).loss
    with torch.no_grad():
        plain = model.eval()(**inputs).loss
    assert trained > plain + 0.005  # 0.01 times at least 1, less what is not even
    torch.testing.assert_close(model(**inputs).loss, plain)  # in eval mode, with gradients
    assert model.train()(**{name: value for name, value in inputs.items() if name != "labels"}).loss is None


@pytest.mark.parametrize("routing", ["dense", "uniform", "random"])
def test_balance__belongs_to_sparse_routing_alone(routing):
    model, inputs = sparse(routing=routing, router_aux_loss_coef=5.0)
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, model.eval()(**inputs).loss, rtol=0.2, atol=0.2)


def test_balance__rows_without_images_add_nothing_of_an_earlier_batch():
    model, inputs = sparse(router_aux_loss_coef=100.0)
    run(model, inputs)  # its graph is gone
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    ids = text["input_ids"]
    text["input_ids"] = ids.where(ids != model.config.image_token_id, 5)
    loss = model(**text).loss
    loss.backward()
    assert loss < 50


def test_balance__leaves_dummies_out():
    model, inputs = sparse(rows=[Row(1, CUP), Row(1, PEOPLE), Row(1, "a dog?")], router_aux_loss_coef=1.0)
    ids = inputs["input_ids"].clone()
    ids[1] = ids[1].where(ids[1] != model.config.image_token_id, 5)
    given: Any = {**inputs, "input_ids": ids, "context_text": [CUP, "no image", "a dog?"], "context_index": [0, 1, 2]}
    flags = torch.tensor([1, 0, 1])
    loss = model(**given, image_flags=flags).loss
    wanted = switch_loss(get_encoder(model), flags.bool())
    assert not torch.isclose(wanted, switch_loss(get_encoder(model)))
    encoder = get_encoder(model)
    encoder.covft_config = encoder.covft_config.replace(router_aux_loss_coef=0)
    plain = model(**given, image_flags=flags).loss
    torch.testing.assert_close((loss - plain).double(), wanted, rtol=1e-4, atol=1e-4)


def test_balance__of_micro_batches_is_their_mean_by_tokens():
    """With num_items_in_batch the Trainer adds losses up, so each call adds its share of the tokens."""
    model, inputs = sparse(rows=[Row(1, CUP), Row(1, PEOPLE)], router_aux_loss_coef=1.0)
    labels = inputs["labels"]
    labels[0, :-3], labels[1, :-9] = -100, -100
    encoder, added = get_encoder(model), []
    for row in (0, 1):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        sums = []
        for factor in (1.0, 0.0):
            encoder.covft_config = encoder.covft_config.replace(router_aux_loss_coef=factor)
            sums.append(model(**one, num_items_in_batch=torch.tensor(12)).loss.double())
        added.append((sums[0] - sums[1], switch_loss(encoder)))
    for (found, loss), share in zip(added, (3 / 12, 9 / 12), strict=True):
        torch.testing.assert_close(found, share * loss, rtol=1e-4, atol=1e-5)


def test_balance__evens_out_the_load():
    torch.manual_seed(1)
    model, inputs = sparse(rows=[Row(4, CUP), Row(4, PEOPLE), Row(4, "a dog?")], router_aux_loss_coef=1.0)
    encoder = get_encoder(model)
    with torch.no_grad():
        for slot in encoder.slots().values():
            slot.router.gate.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))  # nearly all images at expert 0

    def load():
        return max(w.mean(dim=0).max().item() for w in encoder.routing_weights().values())

    optimizer = torch.optim.Adam([p for slot in encoder.slots().values() for p in slot.router.parameters()], lr=0.1)
    for step in range(30):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        if step == 0:
            before = load()
        optimizer.step()
    assert before > 0.8
    assert load() < 0.6


def test_balance__its_factor_is_a_setting():
    mllm = BY_NAME["llava"]
    assert get_encoder(sparse()[0]).covft_config.router_aux_loss_coef == 0.01
    for wrong in (-0.1, float("nan"), float("inf"), "0.1", True):
        with pytest.raises(ConfigError, match="router_aux_loss_coef"):
            attach(mllm.build(), TEXTS, tokenizer=mllm.tokenizer, router_aux_loss_coef=wrong)
