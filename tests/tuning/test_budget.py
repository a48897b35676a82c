"""What methods cost, against what they build."""

import pytest

import covft
from covft.errors import ConfigError
from covft.tuning import budget, match, methods
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import TEXT_DIM
from tests.helpers.tuned import OPTIONS, expected_parameters, tower_of


@pytest.mark.parametrize("method", methods())
def test_parameters_are_those_of_the_formula(method):
    _, vit = tower_of("timm-clip")
    before = snapshot(vit)
    found = budget(vit, method, text_dim=TEXT_DIM, **OPTIONS.get(method, {}))
    assert_unchanged(vit, before)
    assert found.parameters == expected_parameters(method, vit)
    assert found.forward_flops is not None


def test_the_flops_of_low_rank_updates_are_counted():
    _, vit = tower_of("timm-clip")
    found = budget(vit, "lora", r=2, targets="ffn")
    tokens = (32 // 8) ** 2 + 1
    assert found.forward_flops == 4 * 2 * tokens * 2 * 2 * (32 + 128)


def test_covft_costs_what_wrap_builds():
    _, vit = tower_of("timm-clip")
    found = budget(vit, "covft", text_dim=TEXT_DIM, layers=[1, 2])
    encoder = covft.wrap(vit, TEXT_DIM, layers=[1, 2])
    assert found.parameters == sum(p.numel() for p in encoder.trainable_parameters())


def test_matching_finds_the_closest_size():
    _, vit = tower_of("timm-clip")
    target = budget(vit, "lora", r=5).parameters + 3
    lora, prompts, blocks = match(vit, target, ["lora", "vpt", "last_layers"], text_dim=TEXT_DIM)
    assert lora.options == {"r": 5}
    for found, size in ((prompts, "prompts"), (blocks, "n")):
        here = found.options[size]
        others = [n for n in (here - 1, here + 1) if n >= 1]
        for other in others:
            try:
                apart = abs(budget(vit, found.method, **{size: other}).parameters - target)
            except covft.errors.CoVFTError:
                continue
            assert abs(found.parameters - target) <= apart


def test_a_method_without_a_size_cannot_be_matched():
    with pytest.raises(ConfigError, match="no option"):
        match(tower_of("timm-clip")[1], 100, ["bitfit"])


def test_the_flops_of_a_packed_tower_are_not_known():
    _, vit = tower_of("hf-qwen2.5-vl")
    found = budget(vit, "lora", r=2)
    assert found.parameters > 0
    assert found.forward_flops is found.kept_bytes is None
