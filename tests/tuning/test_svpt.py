"""Prompts that start as prototypes of the tower's own tokens."""

import itertools
import json

import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from covft.adapters.registry import describe
from covft.errors import ConfigError, ShapeError
from covft.tuning import load, methods, tune, untune
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.tuned import answer, tower_of

CALLED = ("hooks", "attributes")  # what the first call of a tower of transformers changes


def prompts_of(vit):
    return [p.detach().clone() for name, p in vit.named_parameters() if name.endswith("covft_prompts.prompts")]


def tokens_into(vit, blocks, images):
    """The oracle: the patch tokens that enter each block of a plain CLIP, whose class token is the first."""
    seen = []
    handles = [block.register_forward_pre_hook(lambda block, args: seen.append(args[0])) for block in blocks]
    with torch.no_grad():
        vit(images)
    for handle in handles:
        handle.remove()
    return [tokens[:, 1:].flatten(0, 1) for tokens in seen]


@pytest.mark.parametrize("name", ["timm-clip", "hf-clip"])
def test_prompts_start_at_the_centres_of_clusters(name):
    tower, vit = tower_of(name)
    images = tower.images(5)
    expected = []
    for tokens in tokens_into(vit, [vit.get_submodule(block.path) for block in describe(vit).blocks], images):
        expected.append((tokens, KMeans(3, n_init=5, random_state=1).fit(tokens.numpy()).inertia_))
    tune(vit, "svpt", prompts=3, images=images)
    for prompts, (tokens, inertia) in zip(prompts_of(vit), expected, strict=True):
        distances = torch.cdist(tokens, prompts)
        near = distances.argmin(1)
        for i, prompt in enumerate(prompts):
            torch.testing.assert_close(prompt, tokens[near == i].mean(0))
        assert distances.min(1).values.square().sum() < 1.5 * inertia


def test_a_sample_is_of_different_tokens_that_enter_the_block():
    tower, vit = tower_of("timm-clip")
    images = tower.images(5)
    tokens = tokens_into(vit, vit.blocks, images)
    tune(vit, "svpt", prompts=7, start="sample", images=images, layers=[1, 3])
    for prompts, layer in zip(prompts_of(vit), (1, 3), strict=True):
        near = torch.cdist(prompts, tokens[layer], compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert near.values.max() < 1e-5
        assert len(set(near.indices.tolist())) == 7


def test_the_same_images_in_any_form_and_mode_give_the_same_prompts():
    tower, vit = tower_of("timm-clip")
    images = tower.images(6)
    found = []
    vit.train()
    vit.blocks[2].eval()
    modes = [module.training for module in vit.modules()]
    for given in (images, list(images.split(2)), iter(images), images.double()):
        torch.manual_seed(len(found))
        untune(tune(vit, "svpt", prompts=3, deep=False, images=given))
        assert [module.training for module in vit.modules()] == modes
        tuned = tune(vit, "svpt", prompts=3, images=itertools.chain([images[:1]], images[1:].split(2)))
        found.append(prompts_of(vit))
        untune(tuned)
    for prompts in found[1:]:
        for one, other in zip(found[0], prompts, strict=True):
            torch.testing.assert_close(one, other)
    tune(vit, "svpt", prompts=3, seed=1, images=images)
    assert not torch.allclose(prompts_of(vit)[0], found[0][0])


def test_images_are_needed_once_and_are_not_kept(tmp_path):
    tower, vit = tower_of("hf-clip")
    images = tower.images(4)
    tuned = tune(vit, "svpt", prompts=3, images=images)
    assert not any(isinstance(value, torch.Tensor) for value in vars(tuned.method).values())
    tuned.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "covft_config.json").read_text())["method"]["options"]
    assert options == {"prompts": 3, "deep": True, "layers": None, "start": "kmeans", "seed": 0}
    output = answer(tuned, tower, images)
    again = load(tmp_path, vit=untune(tuned))
    assert torch.equal(answer(again, tower, images), output)


@pytest.mark.parametrize(
    ("images", "options", "error", "match"),
    [
        (None, {}, ConfigError, "there are none"),
        (torch.randn(1, 3, 32, 32), {"prompts": 17}, ConfigError, "fewer tokens"),
        ([], {}, ConfigError, "fewer tokens"),
        ([(torch.randn(1, 3, 32, 32), torch.zeros(1))], {}, ShapeError, "tuple"),
        (torch.randn(32, 32), {}, ShapeError, "images"),
        (torch.randn(1, 3, 31, 37), {}, AssertionError, "match model"),  # which the tower refuses
        (torch.randn(1, 3, 32, 32), {"start": "mean"}, ConfigError, "kmeans"),
        (torch.randn(1, 3, 32, 32), {"seed": -1}, ConfigError, "seed"),
    ],
)
def test_what_cannot_start_the_prompts_changes_nothing(images, options, error, match):
    _, vit = tower_of("timm-clip")
    vit.train()
    before = snapshot(vit)
    with pytest.raises(error, match=match):
        tune(vit, "svpt", images=images, **options)
    assert_unchanged(vit, before)


def test_a_tower_without_values_needs_no_images():
    _, vit = tower_of("timm-clip")
    tuned = tune(vit.to("meta"), methods()["svpt"](prompts=3))
    assert all(isinstance(p, nn.Parameter) and p.is_meta for p in tuned.trainable_parameters())
