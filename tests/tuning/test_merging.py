"""Merging: a plain tower with what was trained in its weights, and nothing else of it."""

import copy

import pytest
import torch
from torch import nn

from covft.errors import CheckpointError, MergeError, UnsupportedViTError
from covft.tuning import methods, tune, untune
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.tiny_vits import TinyViT, conv_ffn, family, images
from tests.helpers.tuned import FAMILIES, READS_TEXT, REFUSED, answer, taken_by, tower_of, tuned_of

MERGING = [name for name, method in methods().items() if method.merges]
UPDATES = ("lora", "dora")  # which are exact up to rounding
CASES = [(method, "hf-clip") for method in MERGING if method not in UPDATES]
CASES += [(method, name) for method in UPDATES for name in FAMILIES if (method, name) not in REFUSED]
TUNED_BY_ALL = (("full", "hf-clip"), ("lora", "hf-clip"))


def everything_of(vit):
    """The attributes of every module, apart from its parameters and other modules."""
    return {name: sorted(vars(part)) for name, part in vit.named_modules()}


def disturb(tuned):
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.grad = torch.ones_like(parameter)


def test_what_merges_is_what_only_changes_weights():
    assert set(MERGING) == {
        "frozen", "full", "bitfit", "layernorm", "ffn", "last_layers", "top_layer", "lora", "dora"
    }  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_merged_tower_is_a_plain_one(method, name):
    tower, vit = tower_of(name)
    vit.double()
    next(vit.parameters()).requires_grad_(False)
    inputs = tower.images(3, torch.float64)
    answer(vit, tower, inputs)  # transformers installs its own hooks in the first call
    before, attributes = snapshot(vit), everything_of(vit)
    tuned = tuned_of(method, vit)
    disturb(tuned)
    output = answer(tuned, tower, inputs)

    assert tuned.merge() is vit
    torch.testing.assert_close(answer(vit, tower, inputs), output)
    if method not in UPDATES:
        assert torch.equal(answer(vit, tower, inputs), output)
    after = snapshot(vit)
    assert all(after[part] == before[part] for part in before.keys() - {"values"})
    assert after["values"].keys() == before["values"].keys()
    assert everything_of(vit) == attributes
    assert all(parameter.grad is None for parameter in vit.parameters())

    merged = snapshot(vit)
    for other in taken_by(name, methods()) if (method, name) in TUNED_BY_ALL else (method,):
        untune(tuned_of(other, vit))
    assert_unchanged(vit, merged)
    assert everything_of(vit) == attributes


def test_what_is_merged_is_spent(tmp_path):
    _, vit = tower_of("timm-clip")
    spent = tuned_of("bitfit", vit)
    spent.merge()
    later = tune(vit, "layernorm")
    for act in (spent.merge, lambda: untune(spent)):
        with pytest.raises(UnsupportedViTError, match="already"):
            act()
    with pytest.raises(CheckpointError, match="already"):
        spent.save_pretrained(tmp_path)
    assert untune(later) is vit


def test_a_copy_is_merged_on_its_own():
    tower, vit = tower_of("hf-clip")
    tuned, inputs = tuned_of("lora", vit), tower.images(3)
    disturb(tuned)
    output = answer(tuned, tower, inputs)
    merged = copy.deepcopy(tuned).merge()
    torch.testing.assert_close(answer(merged, tower, inputs), output)
    assert torch.equal(answer(tuned, tower, inputs), output)
    untune(tuned)


@pytest.mark.parametrize("method", taken_by("timm-clip", ["vpt", "svpt", *READS_TEXT]))
def test_what_depends_on_the_input_is_refused(method):
    tuned = tuned_of(method, tower_of("timm-clip")[1])
    with pytest.raises(MergeError, match="depends on the input"):
        tuned.merge()
    untune(tuned)


def test_updates_that_are_not_finite_are_refused_before_any_is_merged():
    _, vit = tower_of("timm-clip")
    before = snapshot(vit)
    tuned = tuned_of("lora", vit)
    disturb(tuned)
    with torch.no_grad():
        list(tuned.trainable_parameters())[-1][0, 0] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        tuned.merge()
    untune(tuned)
    assert_unchanged(vit, before)


@pytest.mark.parametrize("method", ["full", "bitfit", "lora"])
@pytest.mark.parametrize("leave", [untune, lambda tuned: tuned.merge()])
def test_batch_norms_keep_their_statistics_and_are_trained_again(method, leave):
    vit = TinyViT(conv_ffn(), "BCHW").train()
    before, attributes = snapshot(vit), everything_of(vit)
    tuned = tune(vit, method, adapter=family("BCHW"))
    tuned(images().float())
    leave(tuned)
    assert_unchanged(vit, before)
    assert everything_of(vit) == attributes
    assert all(m.training for m in vit.modules() if isinstance(m, nn.BatchNorm2d))
