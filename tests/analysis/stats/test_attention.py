"""Maps are those of torch's own attention over explicit keys, and of the blocks' outputs, with the patches in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import covft
from covft.analysis.stats.attention import attention_maps, compare_questions
from covft.errors import ShapeError, UnsupportedViTError
from covft.testing import HashTextEncoder, ToyViT
from tests.helpers import oracle
from tests.helpers.towers import BY_NAME, perturb

TEXTS = ["what is left of the cup?", "how many people are there?"]


def wrapped(name, **settings):
    encoder = covft.wrap(BY_NAME[name].build(), HashTextEncoder(16), layers=[1, 2], **settings)
    perturb(encoder)
    return encoder.eval()


def hooks_of(module):
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]


@torch.no_grad()
def test_attention_is_that_of_torch_over_explicit_keys():
    encoder, images = wrapped("hf-clip").double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = hooks_of(encoder)
    found = attention_maps(encoder, images, TEXTS)
    assert hooks_of(encoder) == before
    slot, tokens = encoder.slots()[2], []
    handle = slot.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    encoder(images, TEXTS)
    handle.remove()
    text, context = encoder.encode_text(TEXTS).double(), slot.context
    for image in range(2):
        keys = oracle.refined(tokens[0][image], context.image, "gelu")
        query = oracle.refined(text[image], context.text, "gelu")
        joint = torch.stack([torch.cat([key, query]) for key in keys])[None]
        attention = nn.MultiheadAttention(16, 4, kdim=48, vdim=48, batch_first=True, dtype=torch.float64)
        attention.load_state_dict(oracle.multihead_attention_state(context.attention))
        per_head = attention(query[None, None], joint, joint, average_attn_weights=False)[1][0, :, 0]
        mean = per_head.mean(0)
        np.testing.assert_allclose(found.maps[2][image].ravel(), mean[1:], rtol=1e-4, atol=1e-6)
        assert found.prefix[2][image] == pytest.approx(float(mean[0]), rel=1e-4)
        entropy = -(per_head * per_head.log()).sum(-1).mean()
        assert found.entropy[2][image] == pytest.approx(float(entropy), rel=1e-4)
    assert found.maps[1].shape == (2, 4, 4)
    assert found.pictures.shape == (2, 224, 224, 3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf-clip", "timm-dinov2", "open_clip-native"])
def test_moved_is_the_relative_distance_of_the_blocks_outputs(name):
    encoder, image = wrapped(name), torch.randn(3, 32, 32)
    found = compare_questions(encoder, image, TEXTS)
    blocks = [encoder.vit.get_submodule(block.path) for block in encoder.spec.blocks]
    outputs = []
    for text in TEXTS:
        kept = []
        handles = [
            block.register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out if torch.is_tensor(out) else out[0])
            )
            for block in blocks
        ]
        encoder(image[None], text)
        outputs.append([output[0, -16:] for output in kept])  # the patches come last
        for handle in handles:
            handle.remove()
    assert list(found.moved) == [0, 1, 2, 3]
    assert not found.moved[0].any()  # before the first adapted block nothing depends on the text
    for layer, (a, b) in enumerate(zip(*outputs, strict=True)):
        expected = (a - b).norm(dim=-1) / ((a.square().sum(-1) + b.square().sum(-1)) / 2).sqrt()
        np.testing.assert_allclose(found.moved[layer].ravel(), expected, rtol=1e-3, atol=1e-5)
    encoder(image[None].expand(2, -1, -1, -1), TEXTS)
    np.testing.assert_allclose(found.weights[2], encoder.routing_weights()[2], rtol=1e-4)
    np.testing.assert_allclose(
        found.attention[2], attention_maps(encoder, image.expand(2, -1, -1, -1), TEXTS).maps[2], rtol=1e-3, atol=1e-6
    )


def test_saved_maps_are_read_again(tmp_path):
    encoder, image = wrapped("hf-clip"), torch.randn(3, 32, 32)
    maps, questions = attention_maps(encoder, image[None], TEXTS[0]), compare_questions(encoder, image, TEXTS)
    for saved in (maps, questions):
        saved.save(tmp_path)
        again = type(saved).load(tmp_path)
        for name, value in vars(saved).items():
            for layer, array in value.items() if isinstance(value, dict) else [(None, value)]:
                found = getattr(again, name) if layer is None else getattr(again, name)[layer]
                assert np.array_equal(found, array)


def test_other_methods_that_read_text_are_compared_too():
    tuned = covft.tune(BY_NAME["hf-clip"].build(), "cross_attention", text_encoder=HashTextEncoder(16))
    perturb(tuned, 0.5)
    found = compare_questions(tuned, torch.randn(3, 32, 32), TEXTS)
    assert found.moved[3].any()
    assert (found.weights, found.attention) == ({}, {})


def test_a_wide_image_has_a_wide_grid():
    encoder = covft.wrap(ToyViT(), 16, context="cve", layers=[1])
    encoder.vit.pos_embed = nn.Parameter(torch.zeros(1, 9, 16))
    assert attention_maps(encoder, torch.randn(1, 3, 16, 32), torch.randn(1, 16)).maps[1].shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("settings", "match"), [({"context": "concat"}, "concat"), ({"routing": "uniform"}, "uniform")]
)
def test_a_context_that_does_not_attend_is_refused(settings, match):
    with pytest.raises(UnsupportedViTError, match=f"(?s)does not attend.*{match}"):
        attention_maps(wrapped("hf-clip", **settings), torch.randn(1, 3, 32, 32), TEXTS[0])


def test_what_has_no_grid_or_no_second_question_is_refused():
    packed = covft.wrap(BY_NAME["hf-qwen2-vl"].build(), 16)
    with pytest.raises(UnsupportedViTError, match="packed"):
        attention_maps(packed, torch.randn(1, 3, 32, 32), torch.randn(1, 16))
    with pytest.raises(ShapeError, match="two questions about one"):
        compare_questions(wrapped("hf-clip"), torch.randn(3, 32, 32), TEXTS[:1])
    with pytest.raises(UnsupportedViTError, match="reads no text"):
        compare_questions(covft.tune(ToyViT(), "lora"), torch.randn(3, 16, 16), TEXTS)
