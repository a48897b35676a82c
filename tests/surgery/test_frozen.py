"""A training that does not reach the adapted FFNs says so once, in any loop."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import covft
from tests.helpers.towers import BY_NAME, TEXT_DIM, features


def run(encoder):
    return features(encoder(BY_NAME["timm-clip"].images(2), torch.rand(2, TEXT_DIM)))


def wrapped(**settings):
    return covft.wrap(BY_NAME["timm-clip"].build().train(), TEXT_DIM, layers=[1, 2], **settings)


def test_frozen__warns_once_and_unfreeze_mends_it():
    encoder = wrapped()
    trained = {name for name, p in encoder.vit.named_parameters() if p.requires_grad}
    run(encoder)
    encoder.vit.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"are frozen, so this training does not reach them.*unfreeze"):
        run(encoder)
    run(encoder)
    encoder.unfreeze()
    assert {name for name, p in encoder.vit.named_parameters() if p.requires_grad} == trained
    run(encoder).sum().backward()


@pytest.mark.parametrize("expert_rank", [None, 2])
def test_unfreeze__of_low_rank_experts_leaves_the_shared_ffn_frozen(expert_rank):
    encoder = wrapped(expert_rank=expert_rank, train_norms="adapted")
    trained = {name for name, p in encoder.vit.named_parameters() if p.requires_grad}
    encoder.vit.requires_grad_(False)
    encoder.unfreeze()
    assert {name for name, p in encoder.vit.named_parameters() if p.requires_grad} == trained


def test_frozen__is_silent_where_nothing_is_trained_or_all_of_it_is():
    encoder = wrapped()
    encoder.vit.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.eval()
        run(encoder)
        encoder.train()
        with torch.no_grad():
            encoder.eval()
            run(encoder)
    twin = copy.deepcopy(encoder).train()
    with pytest.warns(UserWarning, match="are frozen"):
        run(twin)
    hooks = len(encoder.vit._forward_pre_hooks)
    covft.unwrap(encoder)
    assert hooks == 2 + len(encoder.vit._forward_pre_hooks)


def test_frozen__open_clip_locks_its_tower():
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.CLIP(
        16,
        open_clip.CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=8, image_size=32),
        open_clip.CLIPTextCfg(context_length=8, vocab_size=32, width=16, heads=2, layers=1),
    )
    encoder = covft.wrap(model.visual, TEXT_DIM, layers=[1])
    model.train()
    model.lock_image_tower()
    texts = torch.rand(2, TEXT_DIM)
    with pytest.warns(UserWarning, match="lock_image_tower"), encoder.condition(texts):
        model.encode_image(torch.rand(2, 3, 32, 32))
    encoder.unfreeze()
    with encoder.condition(texts):
        model.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
    assert isinstance(model.visual, nn.Module)
    assert all(p.grad is not None for p in encoder.trainable_parameters())
