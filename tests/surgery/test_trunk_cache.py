"""The cache of the trunk: which pictures it finds, what it keeps, and that outputs do not change."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations import attach, get_encoder, vit_tower
from covft.testing import HashTextEncoder, ToyViT
from tests.helpers.mllms import BY_NAME as MLLMS
from tests.helpers.mllms import Row
from tests.helpers.releases import trained
from tests.helpers.towers import BY_NAME, TEXT_DIM, Tower, perturb


def wrapped(tower=None, layers=(2,), **settings):
    tower = Tower("toy", ToyViT) if tower is None else tower
    encoder = covft.wrap(tower.build().double().eval(), TEXT_DIM, layers=layers, experts=3, **settings)
    perturb(encoder)
    return encoder


def texts(count):
    return torch.randn(count, TEXT_DIM, dtype=torch.float64)


def pictures(count):
    return torch.rand(count, 3, 16, 16, dtype=torch.float64)


@torch.no_grad()
def test_pictures_are_known_by_their_content():
    encoder, images, text = wrapped(), pictures(3), texts(4)
    trunks = []
    encoder.vit.blocks[0].mlp.register_forward_pre_hook(lambda _, args: trunks.append(len(args[0])))
    batches = [images[[0]], images[[0]].clone(), images[[1, 0, 1, 2]], images + 1e-9]
    expected = [encoder(batch, text[: len(batch)]) for batch in batches]
    trunks.clear()
    with encoder.cached_trunk() as cache:
        for batch, output in zip(batches, expected, strict=True):
            torch.testing.assert_close(encoder(batch, text[: len(batch)]), output, rtol=1e-12, atol=1e-12)
    assert (cache.hits, cache.misses, len(cache)) == (2, 6, 6)
    assert trunks == [1, 2, 3]  # the first; of the third batch, the two that were not seen; the last three


@torch.no_grad()
def test_the_bound_holds_and_the_least_recently_used_goes():
    encoder, images, text = wrapped(), pictures(3), texts(1)
    each = encoder.trunk(images[:1]).states.nbytes
    assert each == encoder.vit.blocks[0](torch.zeros(1, 5, 16).double()).nbytes
    cache = covft.TrunkCache(2 * each)
    with encoder.cached_trunk(cache):
        for number in (0, 1, 0, 2, 0, 1):
            encoder(images[[number]], text)
            assert cache.nbytes == len(cache) * each <= cache.max_bytes
    assert (cache.hits, cache.misses) == (2, 4)  # 0 was used later than 1 when 2 came
    small = covft.TrunkCache(each - 1)
    with encoder.cached_trunk(small):
        encoder(images[:1], text)
    assert (len(small), small.nbytes) == (0, 0)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


@torch.no_grad()
def test_it_is_off_in_training_and_with_gradients_and_forgets_when_the_trunk_changes():
    encoder, images, text = wrapped(), pictures(1), texts(1)
    with encoder.cached_trunk() as cache:
        encoder(images, text)
        encoder.vit.blocks[1].norm2.weight.add_(1)
        changed = encoder(images, text)
        assert (cache.hits, cache.misses, len(cache)) == (0, 2, 1)
        encoder.vit.blocks[2].norm2.weight.mul_(1)  # not of the trunk
        encoder(images, text)
        assert cache.hits == 1
        with torch.enable_grad():
            encoder(images, text).sum().backward()
        encoder.train()
        encoder(images, text)
        assert (cache.hits, cache.misses) == (1, 2)
        encoder.eval()
        with pytest.raises(ConfigError, match="cached already"), encoder.cached_trunk():
            pass
    assert torch.equal(encoder(images, text), changed)
    with pytest.raises(ConfigError, match="keep='last' or 'all'"):
        covft.TrunkCache(0)


@torch.no_grad()
def test_a_tower_that_reads_the_trunk_is_found_out():
    tower = BY_NAME["hf-qwen3-vl"]
    encoder, images, inputs, text = wrapped(tower, [3]), tower.images(2, torch.float64), tower.inputs(2), texts(2)
    expected = encoder(images, text, **inputs)[0]
    with encoder.cached_trunk() as cache:
        for _ in range(2):
            assert torch.equal(encoder(images, text, **inputs)[0], expected)
    assert (cache.keep, len(cache)) == ("all", 2)


@pytest.mark.long
@torch.no_grad()
def test_a_tower_that_returns_tokens_of_all_blocks():
    tower = Tower("timm", lambda: vit_tower("timm:test_vit?num_classes=0", pretrained=False))
    encoder, images, text = wrapped(tower, [-2]), torch.rand(2, 3, 160, 160, dtype=torch.float64), texts(2)
    expected = encoder(images, text, output_hidden_states=True).hidden_states
    with encoder.cached_trunk() as cache:
        for _ in range(2):
            found = encoder(images, text, output_hidden_states=True).hidden_states
            assert found[0] is expected[0] is None  # the tower does not know its embeddings
            assert all(torch.equal(one, other) for one, other in zip(found[1:], expected[1:], strict=True))
    assert (cache.keep, len(cache)) == ("all", 2)


@trained
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", pytest.param("idefics3", marks=pytest.mark.long)])
def test_generate_takes_it(name):
    mllm = MLLMS[name]
    model = mllm.build().double()
    batch = mllm.batch(model, [Row(1, "what is left of the cup?")], torch.float64)
    attach(model, HashTextEncoder(16), tokenizer=mllm.tokenizer, layers=[1])
    encoder = get_encoder(model)
    perturb(encoder)
    questions = ["how many people?", "a dog, and where?"]
    options = {"do_sample": False, "max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    plain = [model.generate(**batch.inputs, context_text=[question], **options).logits for question in questions]
    with encoder.cached_trunk() as cache:
        kept = [model.generate(**batch.inputs, context_text=[question], **options).logits for question in questions]
    assert (cache.hits, cache.misses) == (1, 1)
    assert not torch.equal(plain[0][0], plain[1][0])
    for one, other in zip(plain, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@trained
def test_a_model_that_reads_the_trunk_is_told():
    mllm = MLLMS["vipllava"]
    model = mllm.build()
    model.config.vision_feature_layers = [-2, -4]  # the outputs of blocks 2 and 0
    batch = mllm.batch(model, [Row(1, "what is left of the cup?")])
    attach(model, HashTextEncoder(16), tokenizer=mllm.tokenizer, layers=[2])
    encoder = get_encoder(model)
    with torch.no_grad(), encoder.cached_trunk(), pytest.raises(UnsupportedViTError, match="keep='all'"):
        model(**batch.inputs)
    with torch.no_grad():
        expected = model(**batch.inputs).logits
        with encoder.cached_trunk(covft.TrunkCache(keep="all")):
            assert torch.equal(model(**batch.inputs).logits, expected)
