"""The cached trunk gives LLaVA the same features as the complete tower."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

import covft
from study.trunk import depth, run_trunk, upper_blocks

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def _tower(family: str) -> torch.nn.Module:
    if family == "clip":
        return CLIPVisionModel(CLIPVisionConfig(intermediate_size=64, **SIZES)).eval()
    return Dinov2Model(Dinov2Config(**SIZES)).eval()


@pytest.mark.parametrize("family", ["clip", "dinov2"])
@pytest.mark.parametrize("first", [1, 4])
def test_upper_blocks_on_cached_states_equal_the_complete_tower(family: str, first: int) -> None:
    tower, images = _tower(family), torch.randn(5, 3, 24, 24)
    with torch.no_grad():
        full = tower(images, output_hidden_states=True)
        cached = run_trunk(tower, images, (first,), batch=2)[first]
        with upper_blocks(tower, first):
            upper = tower(cached, output_hidden_states=True)
        again = tower(images, output_hidden_states=True)
    torch.testing.assert_close(upper.hidden_states[-2], full.hidden_states[-2])
    torch.testing.assert_close(upper.last_hidden_state, full.last_hidden_state)
    assert len(upper.hidden_states) == len(full.hidden_states) - first
    # after the context manager, the tower is restored
    assert depth(tower) == tower.config.num_hidden_layers == 5
    assert torch.equal(again.last_hidden_state, full.last_hidden_state)


def test_the_tower_is_restored_after_an_error() -> None:
    tower = _tower("clip")
    names = [name for name, _ in tower.named_modules()]
    with pytest.raises(RuntimeError, match="inside"), upper_blocks(tower, 2):
        raise RuntimeError("inside")
    assert [name for name, _ in tower.named_modules()] == names


def test_a_wrapped_tower_runs_on_cached_states_with_its_context() -> None:
    tower, images = _tower("clip"), torch.randn(3, 3, 24, 24)
    cached = run_trunk(tower, images, (2,))[2]
    encoder = covft.wrap(tower, 12, layers=(2, 3), experts=3, train_norms="adapted").eval()
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        texts = torch.randn(3, 12)
        full = encoder(images, texts, output_hidden_states=True).hidden_states[-2]
        with upper_blocks(tower, 2), encoder.condition(texts):
            upper = tower(cached, output_hidden_states=True).hidden_states[-2]
        with upper_blocks(tower, 2), encoder.condition(texts.flip(0)):
            other = tower(cached, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(upper, full)
    assert (other - full).abs().max() > 1e-3
