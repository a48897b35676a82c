"""Random routing draws the same experts in a recomputation as in its forward, whatever checkpoints do with the RNG."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from covft.conditioning.draws import Draws
from tests.helpers.conditioning import Call, Case

both_modes = pytest.mark.parametrize("preserve", [True, False], ids=["rng", "no-rng"])


def repeated(call: Call, preserve: bool) -> Call:
    return lambda *args: checkpoint(call, *args, use_reentrant=False, preserve_rng_state=preserve)


def of_blocks(case: Case, preserve: bool) -> None:
    """Checkpoint each block."""
    for block in case.encoder.vit.blocks:
        block.forward = repeated(block.forward, preserve)


def two_forwards(case: Case, call: Call) -> None:
    one = call(case.images, case.texts[0]).square().sum()
    two = call(case.others, case.texts[1]).square().sum()
    torch.rand(3)
    (one + 3 * two).backward(retain_graph=True)
    (one * two).backward()  # every frame is recomputed again


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-10), name


@pytest.mark.sampled(2)
@both_modes
@pytest.mark.parametrize("way", ["encoder", "nested", "blocks", "condition"])
def test_gradients__of_random_routing_equal_those_without_checkpoints(way, preserve):
    case = Case("timm-clip", routing="random", experts=6)
    wanted = case.gradients(two_forwards, case.output)
    call = case.output
    if way in ("nested", "blocks"):
        of_blocks(case, preserve)
    if way in ("encoder", "nested"):
        call = repeated(call, preserve)
    if way == "nested":
        call = repeated(call, preserve)
    if way == "condition":
        inner = repeated(lambda images: case.output(images, None), preserve)

        def call(images: Tensor, text: Tensor) -> Tensor:
            with case.encoder.condition(text):
                return inner(images)

        def plain(images: Tensor, text: Tensor) -> Tensor:
            with case.encoder.condition(text):
                return case.output(images, None)

        wanted = case.gradients(two_forwards, plain)
    assert_same(case.gradients(two_forwards, call), wanted)
    torch.manual_seed(1)
    other = case.output(case.images, None)
    assert not torch.equal(case.output(case.images, None), other)  # experts are drawn anew for every forward


@both_modes
def test_gradients__of_blocks_without_a_tower(preserve):
    case = Case("timm-clip", routing="random", experts=6)
    tokens = torch.randn(3, 17, 32, dtype=torch.float64)

    def plain(images: Tensor, text: Tensor) -> Tensor:
        x = tokens + images.mean()
        for block in case.encoder.vit.blocks:
            x = block(x)
        return x

    wanted = case.gradients(two_forwards, plain)
    of_blocks(case, preserve)
    assert_same(case.gradients(two_forwards, plain), wanted)


def test_draws__move_the_generator_on_in_a_recomputation_too():
    """Else dropout in the same region would not be that of the forward."""
    draws, seen = Draws(), []

    def region(x: Tensor) -> Tensor:
        seen.append((draws.next(), draws.next(), torch.rand(()).item()))
        return nn.functional.dropout(x, 0.5).sin()

    x = torch.ones(50, requires_grad=True)
    checkpoint(region, x, use_reentrant=False).sum().backward()
    kept = checkpoint(region, x, use_reentrant=False, preserve_rng_state=False).sum()
    state = torch.get_rng_state()
    kept.backward()
    assert not torch.equal(state, torch.get_rng_state())
    assert seen[0] == seen[1]
    assert seen[2][:2] == seen[3][:2]
    assert len(set(seen[0] + seen[2])) == 6
    del kept
    assert len(draws._of_frame) == 0
