"""The text reaches the FFNs in every recomputation of a forward: gradients are equal with and without checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from covft.utils.transformers_names import CHECKPOINTING, training_field
from tests.helpers.checkpointing import (
    SCENARIOS,
    WAYS,
    assert_same,
    by_library,
    nested,
    plain,
    same_images,
    two_forwards,
)
from tests.helpers.conditioning import Call, Case
from tests.helpers.recomputing import recompute
from tests.helpers.towers import features

CHECKPOINTED = [
    "timm-clip",
    "timm-dinov3",
    "timm-eva02",
    "timm-beit",
    "open_clip-native",
    "open_clip-timm",
    "hf-clip",
    "hf-clip-projection",
    "hf-siglip",
    "hf-siglip2",
    "hf-dinov2",
    "hf-dinov2-registers",
    "hf-dinov3",
    "hf-internvl",
    "hf-vit",
    "hf-qwen2-vl",
    "hf-qwen2.5-vl",
    "hf-qwen3-vl",
    "hf-glm4v",
    "hf-pixtral",
    "hf-mllama",
]


OFTEN = ("timm-clip", "hf-clip", "hf-qwen2.5-vl")  # every way in each run of the tests


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, way, marks=() if name in OFTEN else pytest.mark.long) for name in CHECKPOINTED for way in WAYS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_gradients__equal_with_and_without_checkpointing(name, way):
    case = Case(name)
    wanted = {scenario: case.gradients(scenario, plain(case)) for scenario in SCENARIOS}
    call = way(case)
    for scenario in SCENARIOS:
        assert_same(case.gradients(scenario, call), wanted[scenario])
    # With the texts exchanged the gradients differ, so the scenarios can fail.
    case.texts[0], case.texts[1] = case.texts[1], case.texts[0]
    swapped = case.gradients(two_forwards, call)
    assert any((swapped[n] - g).abs().max() > 1e-9 for n, g in wanted[two_forwards].items())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", [by_library, nested], ids=lambda way: way.__name__)
@pytest.mark.parametrize("settings", [{"routing": "sparse"}, {"routing": "random"}, {"context": "text"}], ids=str)
@pytest.mark.parametrize("name", ["timm-clip", "hf-clip", "hf-qwen2.5-vl"])
def test_gradients__equal_for_other_routings(name, settings, way):
    case = Case(name, **settings)

    wanted = case.gradients(two_forwards, plain(case))
    assert_same(case.gradients(two_forwards, way(case)), wanted)


@pytest.mark.parametrize("name", ["timm-clip", "hf-clip", "open_clip-native"])
def test_gradients__equal_with_dropout_and_offload(name):
    case = Case(name)
    for module in case.encoder.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda _, __, output: nn.functional.dropout(output, 0.3))

    def offloaded(case: Case, call: Call) -> None:
        with torch.autograd.graph.save_on_cpu():
            one = call(case.images, case.texts[0]).square().sum()
        (one + call(case.images, case.texts[1]).square().sum()).backward()

    wanted = case.gradients(offloaded, plain(case))
    assert_same(case.gradients(offloaded, by_library(case)), wanted)


@pytest.mark.skipif(training_field() != CHECKPOINTING[0], reason="this release of transformers has no such options")
def test_gradients__equal_with_every_second_layer_checkpointed_and_offloaded():
    case = Case("hf-clip")
    wanted = case.gradients(same_images, plain(case))
    recompute(case.encoder.vit, every_n_layers=2, offload=True)
    assert_same(case.gradients(same_images, case.output), wanted)


@pytest.mark.parametrize("name", ["timm-clip", "hf-clip", "hf-qwen2.5-vl"])
def test_gradients__equal_with_an_index(name):
    case = Case(name)
    index = torch.tensor([1, 1, 0])

    def call(images: Tensor, text: Tensor) -> Tensor:
        output = case.encoder(images, text[:2], index=index, **case.inputs)
        return features(output)

    def spread(images: Tensor, text: Tensor) -> Tensor:
        return case.output(images, text[:2][index])

    wanted = case.gradients(two_forwards, spread)
    assert_same(case.gradients(two_forwards, call), wanted)
    case.encoder.gradient_checkpointing_enable()
    assert_same(case.gradients(two_forwards, call), wanted)


def test_gradients__equal_for_blocks_called_without_the_tower():
    case = Case("timm-clip")
    tokens = torch.randn(3, 17, 32, dtype=torch.float64)

    def call(images: Tensor, text: Tensor) -> Tensor:
        with case.encoder.condition(text):
            x = tokens
            for block in case.encoder.vit.blocks:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x

    checkpointed = False
    wanted = case.gradients(same_images, call)
    checkpointed = True
    assert_same(case.gradients(same_images, call), wanted)


def test_aux_loss__under_checkpointing():
    case = Case("hf-clip", routing="sparse")

    def scenario(case: Case, call: Call) -> None:
        output = call(case.images, case.texts[0])
        (output.square().sum() + case.encoder.aux_loss()).backward()

    wanted = case.gradients(scenario, plain(case))
    assert_same(case.gradients(scenario, by_library(case)), wanted)


def test_records__are_of_the_last_forward_not_of_a_recomputation():
    case = Case("hf-clip")
    case.encoder.gradient_checkpointing_enable()
    loss = case.output(case.images, case.texts[0]).sum()
    case.output(case.images, case.texts[1])
    last = case.encoder.routing_weights()
    loss.backward()
    for layer, weights in case.encoder.routing_weights().items():
        assert torch.equal(weights, last[layer])


@pytest.mark.parametrize("name", ["timm-clip", "open_clip-native", "hf-clip"])
def test_frames__are_forgotten_with_the_graph(name):
    case = Case(name)
    call = nested(case)
    loss = call(case.images, case.texts[0]).sum()
    noted = case.encoder.conditioning._noted
    assert len(noted) > 0
    loss.backward()
    del loss
    assert len(noted) == 0
