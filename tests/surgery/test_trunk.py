"""The trunk, once per picture: against full calls, one image at a time."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch.utils._pytree import tree_leaves

import covft
from covft.errors import ConfigError, MissingContextError, ShapeError, UnsupportedViTError
from covft.testing import ToyViT
from tests.helpers.towers import BY_NAME, MLLAMA, TEXT_DIM, TOWERS, Tower, body, exact, features, hidden_states, perturb

QUICK = ("timm-clip", "open_clip-native", "hf-clip", "hf-qwen2.5-vl")
every_tower = pytest.mark.parametrize(
    "tower",
    [pytest.param(t, marks=() if t.name in QUICK else pytest.mark.long, id=t.name) for t in (*TOWERS, MLLAMA)],
)


def swin():
    import timm

    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "num_classes": 0}
    return timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), num_heads=(2, 2, 2, 2), **sizes)


def wrapped(tower, layers=(2,), **settings):
    """An encoder in float64 whose text matters."""
    encoder = covft.wrap(tower.build().double().eval(), TEXT_DIM, layers=layers, experts=3, **settings)
    perturb(encoder)
    return encoder


def texts(count):
    return torch.randn(count, TEXT_DIM, dtype=torch.float64)


def single(tower, images, inputs, number, batch):
    """The arguments for one image of a batch."""
    if tower.sizes == "grid_thw":
        return images.split(tower.lengths(batch))[number], {"grid_thw": inputs["grid_thw"][number : number + 1]}
    rows = slice(number, number + 1)
    return images[rows], {name: v[rows] if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}


def tokens(output):
    return features(output).flatten(0, -2)


def assert_same(got, expected, tower="toy"):
    torch.testing.assert_close(got, expected, **exact(tower))


@every_tower
@torch.no_grad()
def test_the_upper_blocks_go_on_from_the_trunk(tower):
    encoder, images, inputs = wrapped(tower), tower.images(3, torch.float64), tower.inputs(3)
    keep = "all" if tower is MLLAMA else "last"  # it reads the output of its first block
    trunk = encoder.trunk(images, keep=keep, **inputs)
    assert len(trunk) == 3
    for text in (texts(3), texts(3)):
        assert torch.equal(tokens(encoder(trunk=trunk, text=text)), tokens(encoder(images, text, **inputs)))
    # Any images, in any order, each as if it were alone.
    order, text = [2, 0, 2, 1], texts(4)
    alone = []
    for row, number in enumerate(order):
        image, given = single(tower, images, inputs, number, 3)
        alone.append(tokens(encoder(image, text[row : row + 1], **given)))
    assert_same(tokens(encoder(trunk=trunk[order], text=text)), torch.cat(alone), tower.name)
    # One image, several texts.
    several = tokens(encoder(trunk=trunk[[2]], text=text))
    image, given = single(tower, images, inputs, 2, 3)
    alone = [tokens(encoder(image, text[row : row + 1], **given)) for row in range(4)]
    assert_same(several, torch.cat(alone), tower.name)


@pytest.mark.long
@torch.no_grad()
def test_a_hierarchical_vit():
    tower = Tower("swin", swin)
    encoder, images, text = wrapped(tower, [3]), tower.images(2, torch.float64), texts(2)
    trunk = encoder.trunk(images)
    assert torch.equal(encoder(trunk=trunk, text=text), encoder(images, text))
    assert_same(encoder(trunk=trunk[[1, 0, 0]], text=text[[1, 0, 0]]), encoder(images, text)[[1, 0, 0]])


@torch.no_grad()
def test_ten_questions_cost_one_trunk():
    encoder, image = wrapped(BY_NAME["hf-clip"]), BY_NAME["hf-clip"].images(1, torch.float64)
    rows = dict.fromkeys(range(4), 0)

    def count(layer):
        def hook(module, args):
            rows[layer] += len(args[0])

        return hook

    for layer, block in enumerate(body(encoder.vit).encoder.layers):
        block.mlp.register_forward_pre_hook(count(layer))
    trunk = encoder.trunk(image)
    encoder(trunk=trunk, text=texts(10))
    assert rows == {0: 1, 1: 1, 2: 10, 3: 10}


@pytest.mark.parametrize("name", ["hf-clip", "hf-dinov2"])
@torch.no_grad()
def test_hidden_states_are_right_or_refused(name):
    tower = BY_NAME[name]
    encoder, images, text = wrapped(tower), tower.images(2, torch.float64), texts(2)
    asked = hidden_states(encoder.vit)
    expected = encoder(images, text, **asked).hidden_states
    got = encoder(trunk=encoder.trunk(images, keep="all", **asked), text=text).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    got = encoder(trunk=encoder.trunk(images, **asked), text=text).hidden_states
    for state in (2, 3, 4):  # from the output of the last block of the trunk on
        assert torch.equal(got[state], expected[state])
    with pytest.raises(UnsupportedViTError, match="keep='all'"):
        got[1] + 1


@torch.no_grad()
def test_a_tower_that_reads_the_trunk_itself():
    tower = BY_NAME["hf-qwen3-vl"]  # reads the outputs of blocks 1 and 2
    encoder, images, inputs, text = wrapped(tower, [3]), tower.images(2, torch.float64), tower.inputs(2), texts(2)
    with pytest.raises(UnsupportedViTError, match="keep='all'"):
        encoder(trunk=encoder.trunk(images, **inputs), text=text)
    found = tree_leaves(encoder(trunk=encoder.trunk(images, keep="all", **inputs), text=text))
    expected = tree_leaves(encoder(images, text, **inputs))
    assert len(expected) > 1  # also what is read of blocks 1 and 2
    for got, state in zip(found, expected, strict=True):
        assert torch.equal(got, state)


def test_a_trained_trunk_has_its_gradients():
    encoder, images = wrapped(Tower("toy", ToyViT), train_norms="all"), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    text = texts(2)
    encoder(images, text).square().sum().backward()
    expected = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder(trunk=encoder.trunk(images), text=text).square().sum().backward()
    got = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert any("blocks.0.norm" in name for name in got)
    for name, gradient in expected.items():
        assert_same(got[name], gradient)


@pytest.mark.parametrize("norms", ["adapted", "none"])
@pytest.mark.parametrize("name", ["hf-clip", "hf-qwen2.5-vl"])
def test_training_on_a_kept_trunk_is_training(name, norms):
    tower = BY_NAME[name]
    encoder = wrapped(tower, layers=(2, 3), train_norms=norms).train()
    full = copy.deepcopy(encoder)
    images, inputs = tower.images(3, torch.float64), tower.inputs(3)
    trunk = encoder.trunk(images, **inputs)  # once, for all steps
    optimizers = [torch.optim.SGD(one.trainable_parameters(), lr=0.1) for one in (encoder, full)]
    for text in (texts(3), texts(3), texts(3)):
        target = torch.randn_like(tokens(full(images, text, **inputs)))
        (tokens(encoder(trunk=trunk, text=text)) * target).mean().backward()
        (tokens(full(images, text, **inputs)) * target).mean().backward()
        own, other = (
            {name: p.grad for name, p in one.named_parameters() if p.grad is not None} for one in (encoder, full)
        )
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
        assert any(gradient.any() for gradient in own.values())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_what_it_was_computed_with_is_checked():
    encoder, images = wrapped(Tower("toy", ToyViT)), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        trunk = encoder.trunk(images)
    for given in ({"images": images}, {"flag": True}):
        with pytest.raises(ConfigError, match="holds its images"):
            encoder(trunk=trunk, text=texts(2), **given)
    with pytest.raises(MissingContextError):
        encoder(trunk=trunk)
    with pytest.raises(ShapeError, match="without text"):
        encoder(trunk=trunk, index=[0, 0])
    with pytest.raises(ShapeError, match="2 images, but the text is for 3"):
        encoder(trunk=trunk, text=texts(3))
    with pytest.raises(ShapeError, match="numbers from 0 to 1"):
        trunk[[0, 2]]
    with torch.no_grad():
        encoder.vit.blocks[2].norm2.weight.add_(1)  # not of the trunk
        text = texts(2)
        assert torch.equal(encoder(trunk=trunk, text=text), encoder(images, text))
        encoder.vit.blocks[1].norm2.weight.add_(1)
    with pytest.raises(ConfigError, match="have changed"):
        encoder(trunk=trunk, text=texts(2))
    trunk = encoder.trunk(images)
    encoder.strength = 0.5
    with pytest.raises(ConfigError, match="have changed"):
        encoder(trunk=trunk, text=texts(2))


def test_an_open_condition_and_an_index_hold():
    encoder, images = wrapped(Tower("toy", ToyViT)), torch.rand(3, 3, 16, 16, dtype=torch.float64)
    text, trunk = texts(2), encoder.trunk(images)
    expected = encoder(images, text, index=[1, 0, 1])
    assert torch.equal(encoder(trunk=trunk, text=text, index=[1, 0, 1]), expected)
    with encoder.condition(text, [1, 0, 1]):
        assert torch.equal(encoder(trunk=trunk), expected)


def test_without_a_trunk():
    encoder = wrapped(Tower("toy", ToyViT), [0, 2])
    with pytest.raises(ConfigError, match="has no trunk"):
        encoder.trunk(torch.rand(1, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(ConfigError, match="has no trunk"), encoder.cached_trunk():
        pass
    with pytest.raises(ShapeError, match="How many images"):
        wrapped(Tower("toy", ToyViT)).trunk()


def test_a_random_trunk_is_refused():
    tower = Tower("timm", lambda: BY_NAME["timm-deit"].build())
    encoder, images = wrapped(tower), tower.images(2, torch.float64)
    encoder.vit.blocks[1].attn.proj_drop.p = 0.5
    encoder.trunk(images)
    encoder.train()
    with pytest.raises(UnsupportedViTError, match="random in training mode"):
        encoder.trunk(images)
    encoder.vit.blocks[1].attn.proj_drop.p = 0.0
    encoder.trunk(images)


def test_nothing_is_left_on_the_tower():
    encoder, images = wrapped(Tower("toy", ToyViT)), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    before = {name: dict(module.__dict__) for name, module in encoder.vit.named_modules()}
    trunk = encoder.trunk(images)
    encoder(trunk=trunk, text=texts(2))
    with pytest.raises(RuntimeError, match="size of tensor"):
        encoder.trunk(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    with encoder.cached_trunk():
        encoder(images, texts(1))
    for name, module in encoder.vit.named_modules():
        assert "forward" not in module.__dict__
        assert module.__dict__.keys() == before[name].keys()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(encoder)))
    text = texts(1)
    assert torch.equal(twin(trunk=twin.trunk(images), text=text), encoder(images, text))


def test_other_threads_run_the_tower_as_ever():
    encoder, images = wrapped(Tower("toy", ToyViT)), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    text, other = texts(2), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected, beside = encoder(images, text), encoder(other, text)
    trunk, results = encoder.trunk(images), []
    inside, go_on = threading.Event(), threading.Event()

    def pause(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(10)

    def resume():
        results.append(encoder(trunk=trunk, text=text))

    handle = encoder.vit.blocks[2].register_forward_pre_hook(pause)
    thread = threading.Thread(target=resume)
    thread.start()
    assert inside.wait(10)
    assert torch.equal(encoder(other, text), beside)
    go_on.set()
    thread.join()
    handle.remove()
    assert torch.equal(results[0], expected)
