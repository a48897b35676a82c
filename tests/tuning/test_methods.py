"""Every method on one tower per family: what changes at the start, what trains, what is saved, what comes back."""

import copy
import re

import pytest
import torch

from covft.errors import CoVFTError, MissingContextError, UnsupportedViTError
from covft.tuning import load, methods, tune, untune
from tests.helpers.recomputing import recompute
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import features
from tests.helpers.tuned import (
    CHANGED_AT_START,
    FAMILIES,
    READS_TEXT,
    REFUSED,
    answer,
    cases,
    expected_parameters,
    taken_by,
    texts,
    tower_of,
    tuned_of,
)

METHODS = list(methods())
# A bias of all keys cancels in the softmax, and the test reads neither the pooled output nor what is after it.
WITHOUT_GRADIENT = re.compile(r"k_proj\.bias|mask_token|merger|pool|head|post_layernorm|^proj$|^norm\.")
# What the first call of a tower of transformers changes: it installs hooks that capture hidden states.
CALLED = ("hooks", "attributes")


def train(tuned, tower, images, text, steps=3):
    """Take steps in double precision, so that every parameter with a gradient moves."""
    optimizer = torch.optim.SGD(tuned.param_groups(lr=0.1))
    target = torch.randn_like(answer(tuned, tower, images, text))
    for _ in range(steps):
        optimizer.zero_grad()
        (answer(tuned, tower, images, text) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("method", "name"), cases(METHODS))
def test_start_training_text_saving_and_undoing(method, name, tmp_path):
    tower, vit = tower_of(name)
    vit.double().requires_grad_(True)
    images, one, other = tower.images(3, torch.float64), texts(method), texts(method)
    plain = answer(vit, tower, images)
    before = snapshot(vit)
    twin = copy.deepcopy(vit)

    tuned = tuned_of(method, vit)
    trained = {name for name, p in tuned.vit.named_parameters() if p.requires_grad}
    assert trained == set(tuned.trained_names())
    assert sum(p.numel() for p in tuned.trainable_parameters()) == expected_parameters(method, twin)
    start = answer(tuned, tower, images, one)
    assert type(features(tuned(images, one, **tower.inputs(3)))) is type(plain)
    if method in CHANGED_AT_START:
        assert not torch.allclose(start, plain)
    else:
        torch.testing.assert_close(start, plain)

    values = {name: p.detach().clone() for name, p in tuned.vit.named_parameters()}
    if method != "frozen":
        train(tuned, tower, images, one)
    moved = {name for name, p in tuned.vit.named_parameters() if not torch.equal(p, values[name])}
    still = trained - moved
    gradients = {name: tuned.vit.get_parameter(name).grad for name in still}
    assert all(g is None or g.abs().max() < 1e-12 for g in gradients.values()), still
    assert [name for name in still if not WITHOUT_GRADIENT.search(name)] == []
    last = answer(tuned, tower, images, one)
    assert torch.equal(last, answer(tuned, tower, images, other)) == (method not in READS_TEXT)

    tuned.save_pretrained(tmp_path)
    again = load(tmp_path, vit=twin)
    assert again.method == tuned.method
    assert torch.equal(answer(again, tower, images, one), last)
    copied = copy.deepcopy(again)
    assert torch.equal(answer(copied, tower, images, one), last)
    for parameter in again.trainable_parameters():
        parameter.data.zero_()  # the copy has its own
    assert torch.equal(answer(copied, tower, images, one), last)

    assert untune(tuned) is vit
    assert_unchanged(vit, before, without=CALLED)
    assert torch.equal(answer(vit, tower, images), plain)
    with pytest.raises(UnsupportedViTError, match="already"):
        untune(tuned)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "vpt", *READS_TEXT])
def test_recomputing_changes_no_gradient(method, name):
    if (method, name) in REFUSED:
        return
    tower, vit = tower_of(name)
    tuned = tuned_of(method, vit.double()).train()
    images, one, other = tower.images(3, torch.float64), texts(method), texts(method)
    gradients = []
    for on in (False, True):
        if on and hasattr(vit, "set_grad_checkpointing"):
            vit.set_grad_checkpointing(True)
        elif on:
            recompute(vit)
        tuned.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = [answer(tuned, tower, images, text).square().sum() for text in (one, other)]
        (losses[0] + 2 * losses[1]).backward()  # both forwards come before either is recomputed
        gradients.append({n: p.grad.clone() for n, p in tuned.vit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_what_cannot_be_used_says_why_and_changes_nothing(method, name):
    _, vit = tower_of(name)
    before = snapshot(vit)
    with pytest.raises(UnsupportedViTError, match=REFUSED[method, name]):
        tuned_of(method, vit)
    assert_unchanged(vit, before)


@pytest.mark.parametrize("method", taken_by("hf-clip", METHODS))
def test_half_precision_is_finite(method):
    tower, vit = tower_of("hf-clip")
    tuned = tuned_of(method, vit.bfloat16())
    output = answer(tuned, tower, tower.images(3, torch.bfloat16), texts(method).bfloat16())
    assert output.dtype == torch.bfloat16
    assert bool(output.isfinite().all())


@pytest.mark.parametrize("method", taken_by("timm-clip", READS_TEXT))
def test_a_call_without_text_is_refused(method):
    tower, vit = tower_of("timm-clip")
    with pytest.raises(CoVFTError, match="text"):
        tune(vit, method)
    tuned = tuned_of(method, vit)
    with pytest.raises(MissingContextError):
        tuned(tower.images(3))
    with tuned.condition(texts(method).float()):
        tuned(tower.images(3))


def test_shallow_prompts_go_from_block_to_block():
    """The oracle: prompts beside the tokens through all blocks, by hand."""
    tower, vit = tower_of("timm-clip")
    images = tower.images(3)
    hidden = {}
    vit.blocks[0].register_forward_pre_hook(lambda block, args: hidden.update(first=args[0]))
    vit(images)
    tuned = tune(vit, "vpt", prompts=2, deep=False)
    prompts = next(p for n, p in vit.named_parameters() if "prompts" in n).detach()
    assert sum(p.numel() for p in tuned.trainable_parameters()) == prompts.numel()
    seen = []
    vit.norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    tuned(images)
    untune(tuned)
    tokens = torch.cat([hidden["first"], prompts.expand(3, -1, -1)], dim=1)
    for block in vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(seen[0], tokens[:, :-2])


def test_strength_is_a_dial_from_the_frozen_tower_to_the_trained_one():
    tower, vit = tower_of("timm-clip")
    images, text = tower.images(3), texts("cross_attention").float()
    plain = answer(vit, tower, images)
    tuned = tuned_of("cross_attention", vit)
    train(tuned, tower, images, text)
    full = answer(tuned, tower, images, text)
    tuned.strength = 0.0
    assert torch.equal(answer(tuned, tower, images, text), plain)
    tuned.strength = 1.0
    assert torch.equal(answer(tuned, tower, images, text), full)
    with pytest.raises(CoVFTError, match="no strength"):
        tune(tower_of("timm-clip")[1], "lora").strength  # noqa: B018
