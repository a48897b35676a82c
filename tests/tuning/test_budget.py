"""What methods cost, against what they build and what a run keeps."""

import pytest
import torch

import covft
from benchmarks.speed.measure import bytes_for_backward
from covft.tuning import budget, methods, tune
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import TEXT_DIM, WIDTH
from tests.helpers.tuned import OPTIONS, READS_STATES, expected_parameters, taken_by, tower_of

TOKENS = (32 // 8) ** 2 + 1


@pytest.mark.parametrize("method", taken_by("timm-clip", methods()))
def test_parameters_and_kept_bytes_are_those_of_the_formula_and_of_a_run(method):
    tower, vit = tower_of("timm-clip")
    before = snapshot(vit)
    found = budget(vit, method, text_dim=TEXT_DIM, **OPTIONS.get(method, {}))
    assert_unchanged(vit, before)
    assert found.parameters == expected_parameters(method, vit)
    tuned = tune(vit, method, text_encoder=TEXT_DIM, images=tower.images(2), **OPTIONS.get(method, {}))
    text = torch.randn(1, 16, TEXT_DIM) if method in READS_STATES else torch.randn(1, TEXT_DIM)
    images = tower.images(1)
    assert found.kept_bytes == bytes_for_backward(lambda: tuned(images, text), tuned.parameters())


def test_the_flops_of_low_rank_updates_are_counted():
    _, vit = tower_of("timm-clip")
    found = budget(vit, "lora", r=2, targets="ffn")
    assert found.forward_flops == 4 * 2 * TOKENS * 2 * 2 * (WIDTH + 4 * WIDTH)


def test_a_step_takes_the_gradients_of_what_trains_and_of_what_is_before_it():
    """The last FFN alone: both of its weights, and the tokens between them."""
    _, vit = tower_of("timm-clip")
    product = 2 * TOKENS * WIDTH * 4 * WIDTH
    head = 2 * vit.head.weight.numel() if hasattr(vit.head, "weight") else 0
    assert budget(vit, "ffn", layers=[-1]).step_flops == 3 * product + head
    assert budget(vit, "frozen").step_flops == 0


def test_covft_costs_what_wrap_builds():
    tower, vit = tower_of("timm-clip")
    found = budget(vit, "covft", text_dim=TEXT_DIM, layers=[1, 2])
    encoder = covft.wrap(vit, TEXT_DIM, layers=[1, 2])
    assert found.parameters == sum(p.numel() for p in encoder.trainable_parameters())
    images, text = tower.images(1), torch.randn(1, TEXT_DIM)
    assert found.kept_bytes == bytes_for_backward(lambda: encoder(images, text), encoder.parameters())


def test_the_flops_of_a_packed_tower_are_not_known():
    _, vit = tower_of("hf-qwen2.5-vl")
    found = budget(vit, "lora", r=2)
    assert found.parameters > 0
    assert found.forward_flops is found.kept_bytes is None
